"""Training runs for test_distributed: the same small model on the same rows, in one process or in several.

The processes are forked from a server that has imported this module once; every process does all runs it is given.
As a script, `distributed_runs.py SCRIPT ARGUMENTS` runs a script that shards, on a machine without a GPU.
"""

import functools
import json
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import support
import torch
from transformers import Trainer, TrainingArguments

from modeling_spiralformer import SpiralFormerForCausalLM

STEPS = 20
ROWS_PER_STEP = 4
SECONDS = 300  # a collective that one process never enters would wait for half an hour
# Tokens in the rows of a step; two ranks take two rows each. In the second, fourth and fifth step one rank's rows are
# all shorter than the largest chunk, once without a single token to predict.
LENGTHS = [[13, 9, 7, 16], [11, 14, 1, 2], [5, 8, 3, 21], [3, 1, 17, 6], [19, 2, 1, 1], [16, 16, 16, 16]]
EVALUATION_LENGTHS = [[2, 3, 18, 11], [14, 8, 2, 2]]


def rows(steps: list[list[int]]) -> list[dict]:
    """Rows of those lengths, in order."""
    lengths = [length for step in steps for length in step]
    return [{"input_ids": support.random_ids(1, length, seed)[0]} for seed, length in enumerate(lengths)]


def collate(batch: list[dict], side: str) -> dict:
    """Pads on one side, with rubbish ids under the padding; labels where a real token precedes."""
    ids, mask = support.pad_rows([row["input_ids"] for row in batch], side)
    predicted = mask * torch.nn.functional.pad(mask, (1, -1))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(predicted == 0, -100)}


def train(
    folder: str,
    model: dict,
    side: str = "right",
    resume: str | None = None,
    schedules: list[str] | None = None,
    **arguments,
) -> dict:
    """Trains for STEPS steps of ROWS_PER_STEP rows over all processes, evaluates, and saves into the folder.

    Args:
        model: fields of the configuration.
        side: where the rows of a batch are padded.
        resume: a checkpoint to go on from.
        schedules: what a schedule is drawn from for each batch.
        arguments: `TrainingArguments` beyond those that all runs share.
    """
    network = support.large_weights(SpiralFormerForCausalLM(support.small_config(num_core_layers=1, **model)))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    shared = {
        "output_dir": folder,
        "per_device_train_batch_size": ROWS_PER_STEP // ranks // arguments.get("gradient_accumulation_steps", 1),
        "per_device_eval_batch_size": ROWS_PER_STEP // ranks,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    trainer_class: Callable = Trainer
    if schedules is not None:
        from workshop.elastic import ElasticTrainer  # not where this is run as a script

        trainer_class = functools.partial(ElasticTrainer, schedules=schedules)
    trainer = trainer_class(
        network,
        TrainingArguments(**{**shared, **arguments}),
        data_collator=functools.partial(collate, side=side),
        train_dataset=rows(LENGTHS),
        eval_dataset=rows(EVALUATION_LENGTHS),
    )
    trainer.train(resume_from_checkpoint=resume)
    result = {
        "losses": {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
        "evaluation": trainer.evaluate()["eval_loss"],
        "wrapper": type(trainer.model_wrapped).__name__,
    }
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if trainer.is_world_process_zero():
        (Path(folder) / "result.json").write_text(json.dumps(result))
    return result


def shard_on_cpu() -> None:
    """Lets accelerate shard without a GPU: on a CPU it would put FSDP aside and run DDP."""
    from accelerate import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def one_process(rank: int, processes: int, port: int, fsdp: bool, runs: list[dict], work: Callable) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fsdp:
        shard_on_cpu()
    for run in runs:
        work(**run)
    torch.distributed.destroy_process_group()


def in_processes(processes: int, runs: list[dict], fsdp: bool = False, work: Callable = train) -> None:
    """Does `work` with the arguments of each run, in so many processes at once; raises what a process raises."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # the server looks for this module there
        multiprocessing.forkserver.ensure_running()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (processes, port, fsdp, runs, work)
    group = torch.multiprocessing.start_processes(
        one_process, arguments, nprocs=processes, join=False, start_method="forkserver"
    )
    try:
        while group.sentinels:
            running = len(group.sentinels)
            group.join(timeout=SECONDS)  # until one has ended
            assert len(group.sentinels) < running, f"{running} processes wait for something that never comes"
    finally:
        for process in group.processes:
            process.kill()


if __name__ == "__main__":
    shard_on_cpu()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
