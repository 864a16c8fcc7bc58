"""The methods of the library: one record each. Entry points are strings, so that reading the catalog imports nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        slug: name in commands and file names. title, authors, arxiv: of the paper (``arxiv`` is its id).
        room: the part of the library it lives in. entry_point: ``module:name`` of what a user calls.
        does: what it is for, in one line. kind: what it is to the library (kernel, probe, edit, drafter).
        extra: the optional dependencies to install (``pip install heedful[extra]``), or None.
        status: "stable" (tests, reproduction and real models), or "experimental".
    """

    slug: str
    title: str
    authors: str
    arxiv: str
    room: str
    kind: str
    entry_point: str
    does: str
    also: tuple[str, ...] = ()
    extra: str | None = None
    status: str = "stable"

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)


METHODS = (
    Method(
        slug="act",
        title="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention Calibration",
        authors="Zhongzhi Yu, Zheng Wang, Yonggan Fu, Huihong Shi, Khalid Shaikh, Yingyan (Celine) Lin",
        arxiv="2406.15765",
        room="steering",
        kind="edit",
        entry_point="heedful.steering:AttentionCalibration",
        also=("heedful.steering:sink_map", "heedful.steering:search_heads"),
        does="takes attention away from late sink tokens, in heads chosen once",
        extra=None,
    ),
    Method(
        slug="hip",
        title="A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention",
        authors="Heejun Lee, Geon Park, Youngwan Lee, Jaduk Suh, Jina Kim, Wonyoung Jeong, Bumsik Kim, Hyemin Lee, Myeongjae Jeon, Sung Ju Hwang",
        arxiv="2406.09827",
        room="attention",
        kind="kernel",
        entry_point="heedful.kernels:HiPAttention",
        also=("heedful.attention:hip_attention",),
        does="each block of queries finds the few hundred keys worth reading by a tree search",
    ),
    Method(
        slug="hidden-transfer",
        title="Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration",
        authors="Pengfei Wu, Jiahao Liu, Zhuocheng Gong, Qifan Wang, Jinpeng Li, Jingang Wang, Xunliang Cai, Dongyan Zhao",
        arxiv="2404.12022",
        room="decoding",
        kind="drafter",
        entry_point="heedful.decoding:HiddenTransfer",
        also=("heedful.training:train_hidden_transfer",),
        does="drafts with pseudo hidden states that the upper layers refine inside the verifying forward",
        extra="peft",
    ),
    Method(
        slug="landmark",
        title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
        authors="Amirkeivan Mohtashami, Martin Jaggi",
        arxiv="2305.16300",
        room="layers",
        kind="layer",
        entry_point="heedful.layers:convert_to_landmark",
        also=(
            "heedful.layers:load_landmark",
            "heedful.layers:LandmarkCache",
            "heedful.layers:LandmarkAttention",
            "heedful.attention:landmark_attention",
            "heedful.training:train_landmark",
        ),
        does="a token at the end of each block is the key to it: trained on short rows, a model reads the few blocks it needs of any context",
    ),
    Method(
        slug="lightning2",
        title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        authors="Zhen Qin, Weigao Sun, Dong Li, Xuyang Shen, Weixuan Sun, Yiran Zhong",
        arxiv="2401.04658",
        room="layers",
        kind="layer",
        entry_point="heedful.layers:LightningAttention",
        also=(
            "heedful.attention:lightning_attention",
            "heedful.attention:alibi_slopes",
            "heedful.layers:LightningCacheLayer",
            "heedful.models:LightningForCausalLM",
            "heedful.models:LightningConfig",
            "heedful.models:LightningModel",
        ),
        does="causal linear attention with a decay a head: linear in time, with a past of constant size",
    ),
    Method(
        slug="longspec",
        title="LongSpec: Long-Context Lossless Speculative Decoding with Efficient Drafting and Verification",
        authors="Penghui Yang, Cunxiao Du, Fengzhuo Zhang, Haonan Wang, Tianyu Pang, Chao Du, Bo An",
        arxiv="2502.17421",
        room="decoding",
        kind="drafter",
        entry_point="heedful.decoding:LongSpec",
        also=("heedful.attention:tree_attention", "heedful.training:train_longspec"),
        does="drafts a beam tree with one block that reads the target's cache, in memory that does not grow",
        extra="peft",
    ),
    Method(
        slug="medusa",
        title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
        authors="Tianle Cai, Yuhong Li, Zhengyang Geng, Hongwu Peng, Jason D. Lee, Deming Chen, Tri Dao",
        arxiv="2401.10774",
        room="decoding",
        kind="drafter",
        entry_point="heedful.decoding:Medusa",
        also=("heedful.training:train_medusa",),
        does="drafts with a few heads on the last hidden state, and verifies a tree of their best tokens",
        extra="peft",
    ),
    Method(
        slug="moh",
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        authors="Peng Jin, Bo Zhu, Li Yuan, Shuicheng Yan",
        arxiv="2410.11842",
        room="layers",
        kind="layer",
        entry_point="heedful.layers:convert_to_moh",
        also=(
            "heedful.layers:MixtureOfHeads",
            "heedful.attention:routed_attention",
            "heedful.attention:routed_projection",
            "heedful.training:train_moh",
        ),
        does="treats attention heads as experts: each token has some of them, from scratch or in a pretrained model",
    ),
    Method(
        slug="retrieval-heads",
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        authors="Wenhao Wu, Yizhong Wang, Guangxuan Xiao, Hao Peng, Yao Fu",
        arxiv="2404.15574",
        room="interp",
        kind="probe",
        entry_point="heedful.interp:retrieval_scores",
        also=("heedful.interp:ablate_heads", "heedful.interp:needle_recall", "heedful.interp:recall_without_heads"),
        does="scores each head by how much of a hidden fact it copies, and removes heads",
    ),
    Method(
        slug="sinklora",
        title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
        authors="Hengyu Zhang",
        arxiv="2406.05678",
        room="training",
        kind="kernel",
        entry_point="heedful.training:train_sinklora",
        also=(
            "heedful.training:extend_context",
            "heedful.kernels:ShiftedSparseAttention",
            "heedful.attention:shifted_sparse_attention",
            "heedful.kernels:H2OCache",
            "heedful.kernels:H2OAttention",
        ),
        does="extends a model's context by LoRA with attention in shifted groups and sinks; reads it with a small H2O cache",
        extra="peft",
    ),
    Method(
        slug="token-recycling",
        title="Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
        authors="Xianzhen Luo, Yixuan Wang, Qingfu Zhu, Zhiming Zhang, Xuanyu Zhang, Qing Yang, Dongliang Xu, Wanxiang Che",
        arxiv="2408.08696",
        room="decoding",
        kind="drafter",
        entry_point="heedful.decoding:TokenRecycling",
        also=("heedful.decoding:PromptLookup", "heedful.decoding:generate"),
        does="drafts a tree from candidates the model has already computed; the output stays the same",
    ),
)  # fmt: skip


def methods() -> tuple[Method, ...]:
    """All methods that have landed, by slug."""
    return METHODS


def get(slug: str) -> Method:
    """The record of one method.

    Raises:
        ValueError: there is no such slug.
    """
    for method in METHODS:
        if method.slug == slug:
            return method
    raise ValueError(f"no method {slug!r}: there are {', '.join(method.slug for method in METHODS)}")
