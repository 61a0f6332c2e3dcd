"""Which loss am I training with? The configuration of another trainer -> the loss that it is.

`read(path)` takes a YAML, JSON or TOML file, a shell script that launches a trainer, or a Python script with a
`GRPOConfig(...)` call, none of which is run; `read(mapping)` takes the settings themselves. What is absent has the
trainer's default in the version that is named (`Reading.version`). A setting that is not understood is named in
`Reading.not_understood`, and then nothing is claimed: `Reading.sure` raises.
"""

from lossmith.adapters.configurations.guess import TRAINERS, read
from lossmith.adapters.configurations.reading import Reading

__all__ = ["TRAINERS", "Reading", "read"]
