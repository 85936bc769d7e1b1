"""Writes hybrid/presets.json from the facts file models.json: ``python tools/make_presets.py MODELS_JSON OUTPUT``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

STATES = ("mamba1", "mamba2", "gdn", "kda", "shortconv", "lightning")
FIXED = ("falcon_h1", "mamba", "mamba2", "falcon_mamba")


def words_of(facts: dict[str, Any]) -> list[str]:
    """A layer list with the counts of the facts, attention spread evenly."""
    counts = facts["layer_counts"]
    state, full = sum(counts[kind] for kind in STATES), counts["attention"]
    if facts["model_type"] == "nemotron_h":
        rest = ["mlp"] * counts["mlp"] + ["moe"] * counts["moe"]
        order = [word for pair in zip(["mamba"] * state, rest, strict=True) for word in pair]
        for i in range(full):
            order.insert(round((i + 1) * (2 * state) / (full + 1)) + i, "attention")
        return order
    if facts["model_type"] == "zamba2":
        places = {round((i + 1) * state / (full + 1)) for i in range(full)}
        return ["hybrid" if i in places else "mamba" for i in range(state)]
    total = state + full
    places = {(i + 1) * total // full - 1 for i in range(full)}
    return ["full_attention" if i in places else "linear_attention" for i in range(total)]


def fields_of(facts: dict[str, Any]) -> dict[str, Any]:
    """config.json fields for an entry that has none (Nemotron-3-Ultra)."""
    mamba = facts["mamba"]
    return {
        "model_type": facts["model_type"], "hidden_size": facts["hidden_size"],
        "num_attention_heads": facts["num_attention_heads"], "num_key_value_heads": facts["num_kv_heads"],
        "head_dim": facts["head_dim"], "mamba_num_heads": mamba["num_heads"], "mamba_head_dim": mamba["head_dim"],
        "ssm_state_size": mamba["d_state"], "n_groups": mamba["n_groups"], "conv_kernel": mamba["conv_kernel"],
        "mamba_ssm_cache_dtype": facts["ssm_dtype_in_config"], "torch_dtype": facts["model_dtype"],
        "max_position_embeddings": 262144,
    }  # fmt: skip


def counts_agree(config: dict[str, Any], facts: dict[str, Any]) -> bool:
    """True if makeready reads the counts of the facts out of this configuration."""
    from makeready.errors import ModelConfigError
    from makeready.hybrid.model_specs import read_model

    try:
        spec = read_model(config, engine="vllm")
    except ModelConfigError as error:
        print(facts["id"], "assembled because", error.message)
        return False
    found = Counter(layer.kind for layer in spec.layers)
    wanted = facts["layer_counts"]
    same = (
        found["attention"] + found["mla"] == wanted["attention"]
        and found["sliding"] == wanted["sliding_attention"]
        and all(found[kind] == wanted[kind] for kind in STATES)
    )
    if not same:
        print(facts["id"], dict(found), "but", wanted)
    return same


def entry(facts: dict[str, Any]) -> dict[str, Any]:
    """One preset."""
    assembled = []
    config = facts["config_fields"]
    if config is None:
        config = fields_of(facts)
        assembled.append("field names from the facts' plain numbers, max_position_embeddings 262144")
    config = {**config}
    if "torch_dtype" not in config:
        config["torch_dtype"] = facts["model_dtype"]
        assembled.append(f"dtype {facts['model_dtype']}")
    if not counts_agree(config, facts):
        config["layer_types"] = words_of(facts)
        assembled.append("layer_types: right counts of each kind, attention spread evenly (positions not seen)")
        if config.get("num_hidden_layers", len(config["layer_types"])) != len(config["layer_types"]):
            raise SystemExit(f"{facts['id']}: {len(config['layer_types'])} layers")
        if not counts_agree(config, facts):
            raise SystemExit(f"{facts['id']}: counts differ")
    return {
        "id": facts["id"], "config": config, "source": facts["source"], "confidence": facts["confidence"],
        "unverified_fields": facts["unverified_fields"], "assembled": "; ".join(assembled),
    }  # fmt: skip


def main() -> None:
    facts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lines = [json.dumps(entry(model), ensure_ascii=False) for model in facts["models"]]
    body = ",\n".join(lines)
    Path(sys.argv[2]).write_text(
        '{"about": "Configuration numbers of published models, with where each was seen. Written by '
        'tools/make_presets.py.",\n"models": [\n' + body + "\n]}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
