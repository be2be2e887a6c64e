"""PEFT's tuners and LoRA's options, each as a recipe on a small model: the rows of the table in docs/finetuning.md."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import peft
import torch
from peft.tuners.lora import config as lora_options
from peft.tuners.lora import corda, loraga
from support import large_weights, random_ids, small_model
from transformers import GPTNeoXConfig, GPTNeoXModel

LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TOKEN_LAYERS = r".*\.(prelude|coda)\..*(query_key_value|dense)"  # those that see tokens
CORE_LAYERS = r".*\.core\..*(query_key_value|dense)"


@dataclass
class Case:
    """One row: how to wrap a model, and what its tuner cannot do for any model.

    Attributes:
        wrap: makes a PEFT model of a plain one.
        merges: PEFT can merge it.
        reloads: its folder alone gives the function again; False where PEFT changed the base weights as well.
        replays: PEFT can train it with gradient checkpointing.
        dtype: float32 where the tuner keeps tensors that `double()` does not reach.
        tolerance: larger where the tuner itself computes in float32.
        given: arguments of a forward of three rows.
        model: options of the model that it wraps.
    """

    wrap: Callable[[torch.nn.Module], torch.nn.Module]
    merges: bool = True
    reloads: bool = True
    replays: bool = True
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    given: dict = field(default_factory=dict)
    config: peft.PeftConfig | None = None
    model: dict = field(default_factory=dict)


def tuner(config_class: type, targets="all-linear", **options) -> Case:
    """A tuner's configuration on `targets`; `options` are its own, or what a `Case` says of it."""
    names = ("merges", "reloads", "replays", "dtype", "tolerance", "given", "model")
    case = {name: options.pop(name) for name in names if name in options}
    if targets is not None:
        options["target_modules"] = targets
    config = config_class(task_type="CAUSAL_LM", **options)
    return Case(lambda model: peft.get_peft_model(model, copy.deepcopy(config)), config=config, **case)


def lora(targets="all-linear", **options) -> Case:
    return tuner(peft.LoraConfig, targets, **{"r": 3, "lora_alpha": 5, **options})


def text(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": random_ids(rows, 24, seed)}


def prepared(prepare: Callable, **options) -> Case:
    """LoRA whose start is drawn from data by `prepare(model, config)`, before the adapters are there."""
    case = lora(LAYERS, **options)

    def wrap(model):
        config = copy.deepcopy(case.config)
        prepare(model, config)
        return peft.get_peft_model(model, config)

    return Case(wrap, config=case.config, reloads=False)


def prepare_corda(model, config) -> None:
    # CorDA takes one row at a time, for any model.
    corda.preprocess_corda(model, config, run_model=lambda: [model(**text(1, s)) for s in range(4)])


def prepare_gradients(model, config) -> None:
    def train_step():
        ids = text()["input_ids"]
        model(ids, labels=ids, use_cache=False).loss.backward()

    loraga.preprocess_loraga(model, config, train_step)


def eva() -> Case:
    case = lora(LAYERS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))

    def wrap(model):
        model = peft.get_peft_model(model, copy.deepcopy(case.config))
        batches = [text(4, seed) for seed in range(4)]
        peft.initialize_lora_eva_weights(model, batches, prepare_layer_inputs_fn=None, show_progress_bar=False)
        return model

    return Case(wrap, config=case.config)


def saved_adapters(count: int, targets) -> list[str]:
    """Folders of LoRA adapters, all different."""
    folders = [tempfile.mkdtemp() for _ in range(count)]
    for seed, folder in enumerate(folders):
        model = lora(targets).wrap(small_model(dtype=torch.float32, num_core_layers=1))
        adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        large_weights(torch.nn.ParameterList(adapters), seed)
        model.save_pretrained(folder)
    return folders


def arrow() -> Case:
    def wrap(model):
        config = lora_options.ArrowConfig(top_k=1)
        return peft.create_arrow_model(model, saved_adapters(2, LAYERS), config)

    return Case(wrap, merges=False, reloads=False)


def x_lora(targets) -> Case:
    def wrap(model):
        model.config.use_cache = False  # as X-LoRA asks
        adapters = {str(index): folder for index, folder in enumerate(saved_adapters(2, targets))}
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, xlora_dropout_p=0.0, adapters=adapters)
        return peft.get_peft_model(model, config)

    return Case(wrap, merges=False)


def several_at_once() -> Case:
    def wrap(model):
        model = peft.get_peft_model(model, copy.deepcopy(lora(LAYERS).config))
        model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
        model.base_model.set_adapter(["default", "other"])
        return model

    return Case(wrap, reloads=False)


def mixed_tuners() -> Case:
    def wrap(model):
        model = peft.get_peft_model(model, copy.deepcopy(lora(LAYERS).config), mixed=True)
        model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=LAYERS))
        model.set_adapter(["default", "other"])
        return model

    return Case(wrap, reloads=False)


CORE_ONLY = {"targets": ["query_key_value"], "layers_to_transform": [0], "layers_pattern": "core"}

LORA = {
    "LoRA": lora(),
    "`use_dora`": lora(use_dora=True),
    "`use_rslora`": lora(use_rslora=True),
    "`lora_bias`": lora(lora_bias=True),
    "`bias`": lora(bias="all"),
    "`lora_dropout`": lora(lora_dropout=0.3),
    "`rank_pattern`": lora(rank_pattern={"core.0.attention.dense": 2}),
    "`alpha_pattern`": lora(alpha_pattern={"core.0.attention.dense": 9}),
    "`exclude_modules`": lora(exclude_modules=["dense"]),
    "`modules_to_save`": lora(modules_to_save=["lm_head", "norm"]),
    "`trainable_token_indices`": lora(trainable_token_indices=[5, 6]),
    "`ensure_weight_tying`": lora([*LAYERS, "embed_tokens", "lm_head"], ensure_weight_tying=True, merges=False),
    "`target_parameters`": lora([], target_parameters=["query_key_value.weight"]),
    "`layers_to_transform`": lora(LAYERS, layers_to_transform=[0]),
    "`layers_pattern`": lora(**CORE_ONLY),
    "`use_bdlora`": lora(
        LAYERS,
        r=4,
        use_bdlora=lora_options.BdLoraConfig(
            ["query_key_value", "h_to_4h"], ["attention.dense", "4h_to_h"], nblocks=2
        ),
    ),
    "`kasa_config`": lora(LAYERS, kasa_config=lora_options.KasaConfig()),
    "`velora_config`": lora(velora_config=lora_options.VeloraConfig(num_groups=4)),
    "`monteclora_config`": lora(LAYERS, monteclora_config=lora_options.MontecloraConfig(), replays=False),
    "`arrow_config`": arrow(),
    "several adapters at once": several_at_once(),
    "`gaussian`": lora(init_lora_weights="gaussian"),
    "`orthogonal`": lora(r=4, init_lora_weights="orthogonal"),
    "`pissa`": lora(LAYERS, init_lora_weights="pissa"),
    "`pissa_niter_4`": lora(LAYERS, init_lora_weights="pissa_niter_4", reloads=False),
    "`olora`": lora(LAYERS, init_lora_weights="olora"),
    "`mica`": lora(LAYERS, init_lora_weights="mica"),
    "`eva`": eva(),
    "`corda`": prepared(
        prepare_corda, init_lora_weights="corda", corda_config=lora_options.CordaConfig(corda_method="kpm")
    ),
    "`lora_ga`": prepared(
        prepare_gradients, init_lora_weights="lora_ga", lora_ga_config=lora_options.LoraGAConfig(stable_gamma=1)
    ),
}

ROWS = torch.arange(3)
TUNERS = {
    "AdaLoRA": tuner(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10),
    "AdaMSS": tuner(peft.AdamssConfig, r=8, num_subspaces=2, subspace_rank=1, dtype=torch.float32, tolerance=1e-5),
    "BEFT": tuner(peft.BeftConfig),
    "BOFT": tuner(peft.BOFTConfig, LAYERS, boft_block_size=4),
    "C3A": tuner(peft.C3AConfig, LAYERS, block_size=4, tolerance=1e-7),
    "DEFT": tuner(peft.DeftConfig, r=2, tolerance=1e-7),
    "DeLoRA": tuner(peft.DeloraConfig, r=2),
    "FourierFT": tuner(peft.FourierFTConfig, n_frequency=10),
    "FRoD": tuner(peft.FrodConfig),
    "GLoRA": tuner(peft.GloraConfig, r=2),
    "GraLoRA": tuner(peft.GraloraConfig, LAYERS, r=4),
    "HiRA": tuner(peft.HiraConfig, r=4),
    "HRA": tuner(peft.HRAConfig, r=4),
    "IA3": tuner(peft.IA3Config, LAYERS, feedforward_modules=["dense_4h_to_h"]),
    "LN tuning": tuner(peft.LNTuningConfig, ["input_layernorm", "post_attention_layernorm", "norm"]),
    "LoHa": tuner(peft.LoHaConfig, r=3),
    "LoKr": tuner(peft.LoKrConfig, r=3),
    "MiSS": tuner(peft.MissConfig, r=4),
    "OFT": tuner(peft.OFTConfig, oft_block_size=4),
    "OSF": tuner(peft.OSFConfig, LAYERS, effective_rank=8),
    "PEANuT": tuner(peft.PeanutConfig, r=4),
    "Poly": tuner(
        peft.PolyConfig, LAYERS, r=2, n_tasks=3, n_splits=2, merges=False, replays=False, given={"task_ids": ROWS}
    ),
    "PSOFT": tuner(peft.PsoftConfig, LAYERS, r=4),
    "PVeRA": tuner(peft.PveraConfig, r=4),
    "RandLoRA": tuner(peft.RandLoraConfig, LAYERS, r=4),
    "RoAd": tuner(peft.RoadConfig, LAYERS, group_size=4),
    "SHiRA": tuner(peft.ShiraConfig, LAYERS, r=2),
    "SuperTuning": tuner(peft.SupertuningConfig, LAYERS, sparsity=0.9),
    "TinyLoRA": tuner(peft.TinyLoraConfig, LAYERS, u=8),
    "trainable tokens": tuner(peft.TrainableTokensConfig, None, token_indices=[5, 6]),
    "UniLoRA": tuner(peft.UniLoraConfig, r=2, theta_d_length=32),
    "VB-LoRA": tuner(peft.VBLoRAConfig, LAYERS, r=2, num_vectors=8, vector_length=4),
    "VeRA": tuner(peft.VeraConfig, r=4),
    "WaveFT": tuner(peft.WaveFTConfig, n_frequency=10),
    "mixed tuners": mixed_tuners(),
}

GATED_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA, QWEN3 = ({"model": {"layer_family": family}} for family in ("llama", "qwen3"))
STREAMS = {"model": {"topology": "hyper_connections", "num_streams": 3}}
OF_FAMILIES = {
    "LoRA without targets, llama": lora(None, **LLAMA),
    "LoRA on queries and outputs, llama": lora(["q_proj", "o_proj"], **LLAMA),
    "LoRA on queries and outputs of the core, qwen3": lora(r".*\.core\..*(q_proj|o_proj)", **QWEN3),
    "`use_dora`, qwen3": lora(GATED_LAYERS, use_dora=True, **QWEN3),
    "all linear, llama": lora(**LLAMA),
    "IA3, qwen3": tuner(peft.IA3Config, ["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **QWEN3),
    "LN tuning, qwen3": tuner(peft.LNTuningConfig, ["input_layernorm", "q_norm", "k_norm", "norm"], **QWEN3),
    "all linear, streams": lora(**STREAMS),
    "LoRA on the gates of streams and the core": lora(
        r".*(\.(read|keep|write)\.projection|\.core\..*dense)", **STREAMS
    ),
    "OFT, llama": tuner(peft.OFTConfig, GATED_LAYERS, oft_block_size=4, **LLAMA),
}

PROMPTS = {
    "prompt tuning": tuner(peft.PromptTuningConfig, None, num_virtual_tokens=3),
    "p-tuning": tuner(peft.PromptEncoderConfig, None, num_virtual_tokens=3),
    "multitask prompt tuning": tuner(
        peft.MultitaskPromptTuningConfig, None, num_virtual_tokens=3, num_tasks=3, given={"task_ids": ROWS}
    ),
    "CPT": tuner(
        peft.CPTConfig, None, cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1, 1, 1, 1], cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
}


def activated(targets) -> Case:
    return lora(targets, alora_invocation_tokens=[7], merges=False)


def shadow() -> Case:
    """ShadowPEFT with a shadow of its own: PEFT cannot mirror this model, whose depth follows from its schedule."""

    def wrap(model):
        folder = tempfile.mkdtemp()
        sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        GPTNeoXModel(GPTNeoXConfig(num_hidden_layers=1, **sizes)).save_pretrained(folder)
        config = peft.ShadowConfig(task_type="CAUSAL_LM", shadow_model=folder, target_modules=r".*core\.\d+")
        return peft.get_peft_model(model, config)

    return Case(wrap)


def eva_by_tokens() -> Case:
    def wrap(model):
        model = peft.get_peft_model(model, lora(LAYERS, init_lora_weights="eva", eva_config=peft.EvaConfig()).config)
        peft.initialize_lora_eva_weights(model, [text()], show_progress_bar=False)

    return Case(wrap)


# What is refused, and the words of the error: by this model from the first forward, or by PEFT when it is set up.
REFUSED = {
    "activated LoRA on the core": (activated(CORE_LAYERS), "Activated LoRA .* prelude and coda alone"),
    "X-LoRA on the core": (x_lora(CORE_LAYERS), "X-LoRA .* prelude and coda alone"),
    "EVA by tokens": (eva_by_tokens(), "EVA .* `prepare_layer_inputs_fn=None`"),
    "Lily": (tuner(peft.LilyConfig, LAYERS, r=4, num_B=2), "Lily .* Take LoRA"),
    "ShadowPEFT": (shadow(), "ShadowPEFT .* Take LoRA"),
    "prefix tuning": (tuner(peft.PrefixTuningConfig, None, num_virtual_tokens=3), "Prefix tuning .* not supported"),
    "cartridges": (tuner(peft.CartridgeConfig, None, num_virtual_tokens=3), "Prefix tuning .* not supported"),
    "adaption prompts": (
        tuner(peft.AdaptionPromptConfig, None, adapter_len=2, adapter_layers=2),
        "Unsupported model type for adaption prompt",
    ),
    "`layer_replication`": (
        lora(layer_replication=[(0, 1), (0, 1)]),
        "Could not locate the layers attribute",
    ),
    "`loftq`": (
        lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)),
        "bitsandbytes is not available",
    ),
}
