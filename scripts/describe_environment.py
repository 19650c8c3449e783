"""Say what this machine can train on and which accelerate config fits.

python scripts/describe_environment.py
"""

import json
from dataclasses import asdict, dataclass

from pokegemma.cli import parse_options, run
from pokegemma.environment import detect_hardware
from pokegemma.options import option


@dataclass
class DescribeEnvironmentOptions:
    json: bool = option(False, "Print JSON instead of two lines.")
    shell: bool = option(False, "Print name=value lines for a shell to read.")


def main() -> None:
    (options,) = parse_options(DescribeEnvironmentOptions, description=__doc__)
    hardware = detect_hardware()
    config = hardware.accelerate_config
    if options.json:
        print(json.dumps({**asdict(hardware), "accelerate_config": config}, indent=2))
    elif options.shell:
        print(f"fitting_config={config}\nnum_gpus={len(hardware.usable_gpus)}\nnum_cores={hardware.num_cores}")
    else:
        print(f"hardware: {hardware.describe()}\naccelerate config that fits: accelerate_configs/{config}.yaml")


if __name__ == "__main__":
    run(main)
