"""Real FSDP on processes of a CPU: accelerate 1.15 looks for it on accelerators only, and takes DDP there."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from pokegemma.provenance import PROJECT_ROOT

FSDP_ON_CPU = f"""
import runpy
from tests.training.fsdp_on_cpu import allow_fsdp_on_cpu

allow_fsdp_on_cpu()
runpy.run_path({str(PROJECT_ROOT / "scripts/sft_pokemon_gemma3.py")!r}, run_name="__main__")
"""
"""A training script that runs FSDP on a CPU; the project's folder must be on the path."""


def allow_fsdp_on_cpu() -> None:
    """Have accelerate see GPUs in processes of a CPU."""
    initialize = PartialState.__init__

    def initialize_as_gpus(self: PartialState, *arguments: object, **options: object) -> None:
        initialize(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = initialize_as_gpus
