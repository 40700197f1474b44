"""An independent re-statement of C3 in plain torch operations, from the description of the computation alone.

It reads a state dict and a few numbers, knows Qwen2 layers only, and shares no line with the model under test: its own
norm, rotary embedding, attention and merging, one sequence at a time, without padding, cache or batch.
"""

from __future__ import annotations

import math

import torch


def rms_norm(x, weight, eps):
    return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps))


def rotate(x, theta):
    """Rotary embedding in half-split form on `(heads, length, head_dim)`."""
    length, dim = x.shape[-2:]
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angles = torch.outer(torch.arange(length, dtype=x.dtype), frequencies)
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(x, weights, prefix, heads, kv_heads, theta):
    def project(name, count):
        y = x @ weights[f"{prefix}.{name}_proj.weight"].T + weights[f"{prefix}.{name}_proj.bias"]
        return y.reshape(len(x), count, -1).transpose(0, 1)

    query, key, value = project("q", heads), project("k", kv_heads), project("v", kv_heads)
    query, key = rotate(query, theta), rotate(key, theta)
    out = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = query[head] @ key[group].T / math.sqrt(query.shape[-1])
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        out.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ value[group])
    return torch.cat(out, dim=-1) @ weights[f"{prefix}.o_proj.weight"].T


def run_layers(x, weights, prefix, config):
    """Hidden states `(length, hidden_size)` after the final norm; `config` is a Qwen2 config as a dict."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    eps = config["rms_norm_eps"]
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}.layers.{i}"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
        x = x + attend(normed, weights, f"{layer}.self_attn", heads, kv_heads, config["rope_theta"])
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        gate = normed @ weights[f"{layer}.mlp.gate_proj.weight"].T
        up = normed @ weights[f"{layer}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    return rms_norm(x, weights[f"{prefix}.norm.weight"], eps)


def compress(weights, encoder_config, context_ids, start_id):
    """Latents `(num_latents, text_hidden_size)` of one context."""
    queries = weights["model.latent_queries.weight"]
    table = weights["model.encoder.embed_tokens.weight"]
    x = torch.cat([table[torch.tensor([*context_ids, start_id])], queries])
    hidden = run_layers(x, weights, "model.encoder", encoder_config)[-len(queries) :]
    return hidden @ weights["model.projector.weight"].T + weights["model.projector.bias"]


def logits(weights, config, prompt_ids, contexts):
    """
    Logits `(length, vocab_size)` of one prompt with its contexts.

    `weights`: the state dict; `config`: dict with `encoder`, `decoder` (Qwen2 configs as dicts), `start_id` and
    `placeholder_id`; `contexts`: a list of lists of ids.
    """
    table = weights["model.language_model.embed_tokens.weight"]
    rows = list(table[torch.tensor(prompt_ids)])
    latents = [row for ids in contexts for row in compress(weights, config["encoder"], ids, config["start_id"])]
    for position, token in enumerate(prompt_ids):
        if token == config["placeholder_id"] and latents:
            rows[position] = latents.pop(0)
    hidden = run_layers(torch.stack(rows), weights, "model.language_model", config["decoder"])
    return hidden @ weights.get("lm_head.weight", table).T
