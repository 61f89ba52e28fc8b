"""Loading a checkpoint by name or path, with one clear sentence for everything that can be wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from capa_probe.errors import CapaProbeError
from capa_probe.lvlm.families import FAMILIES, family_of
from capa_probe.memory import refuse_too_large

#: Where and how files are found: for the config, the model and the processor alike.
HUB_OPTIONS = ("token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")


def load(
    name_or_path: str | os.PathLike[str],
    dtype: Any,
    device_map: Any,
    revision: str | None,
    **hf_kwargs: Any,
) -> tuple[PreTrainedModel, Any]:
    """Model and processor of a checkpoint; remote code is never executed.

    Raises:
        CapaProbeError: there is no such checkpoint, it needs remote code, its family is not supported, or its weights
            do not fit into memory.
    """
    if "config" in hf_kwargs:
        raise CapaProbeError(
            "config= was given to from_pretrained; load the model with transformers and give it to HookedLVLM instead."
        )
    hub = {name: hf_kwargs.pop(name) for name in HUB_OPTIONS if name in hf_kwargs} | {"revision": revision}
    if hf_kwargs.pop("trust_remote_code", False):
        raise CapaProbeError(
            "trust_remote_code=True was given, but code from a checkpoint is never executed; use a checkpoint in "
            f"transformers' own format, such as {_examples()}."
        )
    name = str(name_or_path)
    if not Path(name).is_dir() and (
        Path(name).is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1
    ):
        raise CapaProbeError(
            f"The model folder {name} does not exist; give an existing one or a name on the hub (owner/name)."
        )
    if Path(name).is_dir() and not (Path(name) / hub.get("subfolder", "") / "config.json").is_file():
        raise CapaProbeError(
            f"The folder {name} holds no config.json; give the folder of a Hugging Face checkpoint."
        )
    _check_config_file(Path(name) / hub.get("subfolder", "") / "config.json")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    except OSError as error:
        if Path(name).is_dir():
            raise CapaProbeError(f"The config of {name} cannot be read: {_first_line(error)}") from error
        raise CapaProbeError(
            f"The model {name} was found neither as a local folder nor on the Hugging Face hub or in its cache; check "
            f"the name{'' if revision is None else ', the revision'} and the network ({_first_line(error)})"
        ) from error
    except (ValueError, KeyError) as error:
        raise CapaProbeError(
            f"The checkpoint {name} needs code that transformers does not have, and remote code is never executed; use "
            f"its transformers-native version, such as {_examples()} ({_first_line(error)})"
        ) from error
    except Exception as error:
        raise CapaProbeError(f"The config of {name} cannot be read: {_first_line(error)}") from error
    family_of(config, f"The checkpoint {name}")
    n_layers = config.get_text_config().num_hidden_layers
    if not isinstance(n_layers, int) or n_layers < 1:
        raise CapaProbeError(
            f"The config of {name} says num_hidden_layers={n_layers!r}; it must be 1 or more."
        )
    try:
        refuse_too_large(name, config, dtype, device_map)
        model, found = AutoModelForImageTextToText.from_pretrained(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in words of our own
            config=config,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=False,
            **hub,
            **hf_kwargs,
        )
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False, **hub)
    except CapaProbeError:
        raise
    except Exception as error:  # a config or a processor can be wrong in any way
        raise CapaProbeError(f"The checkpoint {name} could not be loaded: {_first_line(error)}") from error
    for weight, in_file, in_model in found["mismatched_keys"]:
        raise CapaProbeError(
            f"The checkpoint {name} holds {weight} of shape {tuple(in_file)}, but its config asks for "
            f"{tuple(in_model)}; fetch or save it again."
        )
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would go on with random numbers
        more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise CapaProbeError(
            f"The checkpoint {name} lacks {missing[0]}{more}, which its config asks for; fetch or save it again."
        )
    return model.eval(), processor


def _examples() -> str:
    return ", ".join(family.example for family in FAMILIES.values())


def _check_config_file(file: Path) -> None:
    """Local configs only: what is no JSON object would be taken for something else."""
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CapaProbeError(f"The config {file} cannot be read: {_first_line(error)}.") from error
    if not isinstance(content, dict):
        raise CapaProbeError(f"The config {file} cannot be read: it is no JSON object.")


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    # A KeyError says nothing but the key.
    return (
        f"{type(error).__name__}: {text}"
        if isinstance(error, (KeyError, AttributeError)) or not text
        else text
    )
