"""A training script that runs real FSDP on processes of a CPU."""

from pokegemma.provenance import PROJECT_ROOT

FSDP_ON_CPU = f"""
import runpy
from accelerate.state import PartialState
from accelerate.utils import DistributedType

initialize = PartialState.__init__


def initialize_as_gpus(self, *arguments, **options):
    initialize(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = initialize_as_gpus
runpy.run_path({str(PROJECT_ROOT / "scripts/sft_pokemon_gemma3.py")!r}, run_name="__main__")
"""
"""accelerate 1.15 looks for FSDP on accelerators only, and takes DDP for processes of a CPU."""
