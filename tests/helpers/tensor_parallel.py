"""What test_tensor_parallel asks of a model, whole in one process or dealt out over several.

A module of its own, because the processes of `distributed_runs` import it.
"""

import support
import torch
from transformers import AutoModelForCausalLM

# Every family at four heads, two of keys where it may: two processes have half of them each.
MODELS = {
    "gpt_neox": {"layer_family": "gpt_neox", "share_core": False, "tie_word_embeddings": True, "topology": "anchor"},
    "llama": {"layer_family": "llama", "num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True},
    "qwen3": {"layer_family": "qwen3", "num_key_value_heads": 2, "head_dim": 6, "chunk_sizes": [3, 1]},
    "streams": {"layer_family": "llama", "num_key_value_heads": 2, "topology": "hyper_connections"},
    "plain": {"layer_family": "llama", "num_key_value_heads": 2, "chunk_sizes": [], "num_core_layers": 0},
}
# Chunk sizes of the view that each model is asked through as well.
PARTS = {"gpt_neox": [4, 1], "llama": [2, 1], "qwen3": [1]}
SEARCHES = {
    "greedy": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
}


def make_model(name: str):
    """The model of that name, whole."""
    return support.small_model(num_attention_heads=4, hidden_size=32, dtype=torch.float64, **MODELS[name])


def all_answers(model, name: str) -> dict[str, torch.Tensor]:
    """`answers` of the model of that name, and of its view."""
    found = answers(model)
    if name in PARTS:
        model.zero_grad()
        view = model.eval().with_schedule(PARTS[name])
        found |= {f"view, {what}": value for what, value in answers(view).items()}
    return found


def answers(model) -> dict[str, torch.Tensor]:
    """Logits of a padded batch and of each way to generate from it, the loss, and the gradient of every parameter."""
    ids, mask = support.pad_rows([support.random_ids(1, length)[0] for length in (9, 23, 14)], "left")
    found = {}
    for name, how in SEARCHES.items():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **how,
        )
        found |= {f"{name}, tokens": out.sequences, f"{name}, logits": torch.stack(out.logits)}
    out = model.train()(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    found |= {"loss": out.loss.detach(), "logits": out.logits.detach()[mask == 1]}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[f"gradient of {name}"] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def answer(name: str, folder: str, result: str, how: dict) -> None:
    """What one of several processes does: answers by its part of the model in the folder; the first writes them.

    Args:
        name: of the model.
        how: what `from_pretrained` is told beside the folder.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model = support.make_exact(AutoModelForCausalLM.from_pretrained(folder, **how))
    found = all_answers(model.eval(), name)
    found |= {"tp_plan": model.tp_plan, "weights": own_weights(model)}
    if name in PARTS:
        view = model.with_schedule(PARTS[name])
        view.save_pretrained(f"{folder}, view")  # every process: the shares are gathered
        found |= {"processes of the view": view.tp_size, "tp_plan of the view": view.tp_plan}
    if torch.distributed.get_rank() == 0:
        torch.save(found, result)


def own_weights(model) -> dict[str, int]:
    """How many values of each parameter a process holds."""
    parts = ((name, getattr(weight, "_local_tensor", weight)) for name, weight in model.named_parameters())
    return {name: part.numel() for name, part in parts}
