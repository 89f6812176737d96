"""The prototype for MLA."""

from __future__ import annotations

from collections.abc import Iterator

from fraqtl_bench.reporting.markdown import table
from fraqtl_bench.reporting.pages.numbers import fixed, share, times
from fraqtl_bench.reporting.pages.results import block, load, source

HEAD = [
    "form",
    "bytes of a token and layer",
    "of `bf16`",
    "KL divergence, nat",
    "its 99th percentile",
    "same most probable token",
    "perplexity",
]


@block("latent")
def latent() -> Iterator[str]:
    file = load("cpu/quality/latent.json")
    forms = file.data["forms"]
    plain = forms[0]["token_bytes"]
    yield from table(
        HEAD,
        [
            [
                f"`{row['form']}`" if row["form"] in ("bf16", "fp8_ds_mla") else row["form"],
                fixed(row["token_bytes"]),
                times(plain / row["token_bytes"]),
                f"{row['kl']:.1e}",
                f"{row['kl_p99']:.1e}",
                share(row["agreement"], 1),
                fixed(row["perplexity"], 3),
            ]
            for row in forms
        ],
    )
    model, training = file.data["model"], file.data["training"]
    yield from source(
        file,
        model=f"a DeepSeek-V3 of {model['layers']} layers, {model['heads']} heads, latent {model['latent']}, rope "
        f"{model['rope']}, trained on {fixed(training['tokens'])} tokens",
    )
