"""What the result file holds of a family."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Scheduling:
    """The same prompts, scheduled otherwise."""

    cached_tokens: int
    """Found in the prefix cache when the prompts came again."""
    preemptions: int
    """When all prompts came at once."""
    changed: list[str]
    """Of chunks, hits and preemption, what changed a text."""


@dataclass
class FormatResult:
    """A format in a float32 model, so that nothing but the cache rounds."""

    largest_difference: float
    """nat: of any token's log-probability from that of transformers, whose cache went through the format's codec."""
    texts: int
    texts_of_transformers: int
    """Of them, those in which every token is the one that this transformers chooses, or as likely."""
    texts_that_begin_alike: int
    """Those whose first tokens are what transformers with an exact cache chooses, or nearly as likely."""
    error: float
    """nat, root mean square: of log-probabilities from those of transformers with an exact cache."""
    codec_error: float
    """The same of transformers whose cache went through the codec, without residuals."""
    scheduling: Scheduling


@dataclass
class SequenceBytes:
    """What one sequence of `max_model_len` tokens takes in that engine, by vLLM's own plan."""

    max_model_len: int
    attention: int
    attention_with_bf16: int
    states: int
    padding: int
    """Behind states."""


@dataclass
class ServedResult:
    """The default format in a bfloat16 model, as people serve it, and how much fits."""

    error: float
    """nat, root mean square: of log-probabilities from those of transformers in float32 with an exact cache."""
    error_with_bf16: float
    """The same of a bf16 cache in the same engine."""
    memory_bytes: int
    """Of both pools."""
    tokens: int
    """That vLLM counts into it."""
    tokens_with_bf16: int
    """That it counts into a real pool of bf16,"""
    tokens_said_of_bf16: int
    """and that the packed engine says it would count."""
    block_bytes: int
    baseline_block_bytes: int
    sequence: SequenceBytes


@dataclass
class AccountsResult:
    """Random requests whose accounts were held against a witness in the block manager."""

    requests: int
    aborted: int
    with_shared_blocks: int
    preemptions: int
    mismatches: list[str]


@dataclass
class Row:
    """A family."""

    title: str
    layers: list[str] = field(default_factory=list)
    """What its attention layers are like."""
    refused: str = ""
    """The sentence with which the server refuses it."""
    formats: dict[str, FormatResult] = field(default_factory=dict)
    served: ServedResult | None = None
    accounts: AccountsResult | None = None
    problems: list[str] = field(default_factory=list)
    """What should not be so."""
    seconds: float = 0.0
    day: str = ""
    versions: dict[str, str] = field(default_factory=dict)
