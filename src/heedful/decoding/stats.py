"""What one generate cost and how much of what was drafted was accepted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class DecodingStats:
    """Statistics of one generate.

    Attributes:
        steps: forwards of the model after the prefill; the prefill reads the whole prompt and gives the first token.
        new_tokens: tokens generated in each row, EOS included, padding not.
        accepted: for each row the number of tokens that each of its steps emitted.
        acceptance_by_depth: entry d - 1: the share of the trees with a node of depth d whose accepted path reached depth d.
        prefill_seconds: reading the prompt and choosing the first token.
        draft_seconds: the drafter's own time (propose and update).
        verify_seconds: the model's forwards, from the tokens to the logits.
        commit_seconds: the walk down the trees with processors and stopping criteria, and the compaction of the cache. In
            CUDA graphs both are part of ``verify_seconds``, and this is what the host takes.
        capture_seconds: making CUDA graphs, part of the decoding time of the first generate that needs them.
        graph_bytes: device memory that the graphs and their cache hold; 0 in the eager engine.
    """

    steps: int = 0
    new_tokens: list[int] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)
    acceptance_by_depth: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    commit_seconds: float = 0.0
    capture_seconds: float = 0.0
    graph_bytes: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens emitted per forward and row, the mean over all entries of ``accepted``: 1.0 for plain decoding."""
        entries = [emitted for row in self.accepted for emitted in row]
        return sum(entries) / len(entries) if entries else 1.0

    @property
    def decode_seconds(self) -> float:
        """Everything after the prefill."""
        return self.draft_seconds + self.verify_seconds + self.commit_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens that came after the first one of each row, per second of decoding; 0.0 when there are none."""
        tokens = sum(self.new_tokens) - len(self.new_tokens)
        return tokens / self.decode_seconds if tokens > 0 and self.decode_seconds > 0 else 0.0

    @property
    def tokens_per_second_with_prefill(self) -> float:
        """All new tokens per second of prefill and decoding."""
        seconds = self.prefill_seconds + self.decode_seconds
        return sum(self.new_tokens) / seconds if seconds > 0 else 0.0
