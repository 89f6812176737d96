"""Train an EAGLE or EAGLE-3 head for the demo model, and write it as vLLM reads one.

    python -m fraqtl_bench.demo_model.eagle_head OUT --method eagle --steps 400

A head is one decoder layer (Li et al., 2024, arXiv 2401.15077). From what the model knows at a position, a vector f_i,
and the token that follows, it guesses what the model will know at the next position. An output layer makes a draft:

    g_i = layer(embedding(x_(i+1)), f_i),   draft of x_(i+2) = argmax(output(g_i)),   f_(i+1) = g_i for the next draft

With EAGLE f_i is the model's last hidden state, and the guess is held to the next one. With EAGLE-3 (arXiv 2503.01840)
it is a product of the hidden states of three layers, and the head learns by drafting twice in a row. Both learn the
model's own distributions.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from fraqtl_bench.demo_model.corpus import Corpus, standard_library_prose
from fraqtl_bench.demo_model.train import make_batch
from fraqtl_bench.quantizer.capture import demo_model

LENGTHS = (128, 256, 512)
AUXILIARY_LAYERS = (1, 2, 3)  # of the demo model's four: hidden states before these layers
RATE = 3e-3
HIDDEN_WEIGHT = 0.5  # of the error of the hidden state beside that of the distribution


class EagleHead(nn.Module):
    """Hidden states (B, T, H) and embeddings of the tokens that follow -> guessed next hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = LlamaDecoderLayer(config, 0)
        self.layer.input_layernorm = nn.Identity()  # as EAGLE has it
        self.rotary = model.model.rotary_emb

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        x = self.fc(torch.cat([embedded, hidden], -1))
        guessed: Tensor = self.layer(x, position_embeddings=_positions(self.rotary, x), attention_mask=None)
        return guessed

    def loss(self, model: Any, ids: Tensor) -> Tensor:
        """ids: (B, T) of text."""
        states, target, embedded = _known(model, ids)
        hidden = states[-1]
        guessed = self(hidden[:, :-1], embedded[:, 1:])[:, :-1]
        distance = F.smooth_l1_loss(guessed, hidden[:, 1:-1])
        return _divergence(model.lm_head(guessed), target[:, 1:-1], ids[:, 2:]) + HIDDEN_WEIGHT * distance

    def tensors(self) -> dict[str, Tensor]:
        layer = {f"layers.0.{name}": weight for name, weight in self.layer.state_dict().items()}
        return {"fc.weight": self.fc.weight.data, **layer}


class Eagle3Head(nn.Module):
    """Vectors of positions (B, T, H) and embeddings of the tokens that follow -> guessed vectors of the next ones."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        size, head = config.hidden_size, config.head_dim
        self.fc = nn.Linear(len(AUXILIARY_LAYERS) * size, size, bias=False)
        self.midlayer = LlamaDecoderLayer(config, 0)
        for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            setattr(self.midlayer.self_attn, f"{name}_proj", nn.Linear(2 * size, heads * head, bias=False))
        self.midlayer.self_attn.v_proj = nn.Linear(2 * size, config.num_key_value_heads * head, bias=False)
        self.midlayer.hidden_norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.rotary = model.model.rotary_emb
        self.output: Tensor = model.lm_head.weight.data

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        layer: Any = self.midlayer
        x = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], -1)
        attended, _ = layer.self_attn(x, position_embeddings=_positions(self.rotary, x), attention_mask=None)
        hidden = hidden + attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def loss(self, model: Any, ids: Tensor) -> Tensor:
        """Of two drafts in a row. ids: (B, T) of text."""
        states, target, embedded = _known(model, ids)
        hidden = self.fc(torch.cat([states[layer] for layer in AUXILIARY_LAYERS], -1))[:, :-1]
        losses = []
        for ahead in (1, 2):
            hidden = self(hidden, embedded[:, ahead:])[:, :-1]
            drafted = F.linear(self.norm(hidden), self.output)
            losses.append(_divergence(drafted, target[:, ahead:-1], ids[:, ahead + 1 :]))
        return torch.stack(losses).mean()

    def tensors(self) -> dict[str, Tensor]:
        own = {name: x for name, x in self.state_dict().items() if not name.startswith("rotary")}
        return {**own, "lm_head.weight": self.output}


HEADS: dict[str, Callable[[Any], EagleHead | Eagle3Head]] = {"eagle": EagleHead, "eagle3": Eagle3Head}


def _positions(rotary: nn.Module, x: Tensor) -> Any:
    return rotary(x, torch.arange(x.shape[1])[None])


@torch.no_grad()
def _known(model: Any, ids: Tensor) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """The model's hidden states, its log-probabilities, and the embeddings of the tokens."""
    found = model(ids, output_hidden_states=True)
    return found.hidden_states, found.logits.float().log_softmax(-1), model.get_input_embeddings()(ids)


def _divergence(logits: Tensor, target: Tensor, tokens: Tensor) -> Tensor:
    """KL of drafts from the model's log-probabilities, a mean over the places where there is text: padding is 0."""
    drafted, known = logits.float().log_softmax(-1), (tokens != 0)[..., None]
    return (target.exp() * (target - drafted) * known).sum() / known.sum()


def train(out: Path, steps: int, method: str = "eagle", step_tokens: int = 4096, seed: int = 0) -> list[float]:
    """Write config.json and model.safetensors to `out`. Returns the loss of every step."""
    torch.manual_seed(seed)
    source = demo_model()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    corpus = Corpus(Tokenizer.from_file(str(source / "tokenizer.json")), standard_library_prose())
    rng = random.Random(seed)
    head = HEADS[method](model)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        length = rng.choice(LENGTHS)
        loss = head.loss(model, make_batch(corpus, rng, step_tokens // length, length).ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    save(out, head, source)
    return losses


def save(out: Path, head: EagleHead | Eagle3Head, source: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    if isinstance(head, Eagle3Head):
        layers = list(AUXILIARY_LAYERS)
        config |= {"eagle_aux_hidden_state_layer_ids": layers, "num_aux_hidden_states": len(layers)}
        config |= {"draft_vocab_size": config["vocab_size"]}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: x.contiguous() for name, x in head.tensors().items()}, out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=sorted(HEADS), default="eagle")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    losses = train(args.out, args.steps, args.method)
    print(f"loss {losses[0]:.3f} at first, {sum(losses[-10:]) / len(losses[-10:]):.3f} in the end")


if __name__ == "__main__":
    main()
