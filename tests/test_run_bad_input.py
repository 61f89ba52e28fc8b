"""Everything one can get wrong with ``capa-probe run``: one clear line, a status of 2, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import capa_probe as cp
from capa_probe.benchmark.one_prompt import run_one_prompt
from capa_probe.errors import CapaProbeError
from capa_probe.pruning import CAPA
from capa_probe.pruning.ffn import HadamardFFN
from capa_probe.pruning.methods import build
from tests import processors, tiny
from tests.test_cli import invoke, refused

TOO_MUCH_AT_ONCE = "need tokens that are dropped once"
CASES = {
    # how much is kept
    "--keep 0": "keep=0 was given, which leaves no visual token; say allow_none=True (--allow-none) if that is meant",
    "--keep 0.0": "which leaves no visual token",
    "--keep 1.5": "keep=1.5 was given; give a share in (0, 1] or a whole number of tokens above 1.",
    "--keep -1": "keep=-1.0 was given; give a share in (0, 1]",
    "--keep nan": "keep=nan was given; give a share in (0, 1]",
    "--keep inf": "keep=inf was given; give a share in (0, 1]",
    "--keep all": "--keep all was given; give a share of the visual tokens in (0, 1], such as 0.25",
    "--keep 17": "keep=17 was given, but the prompt has only 16 visual tokens; give a smaller count, or a share",
    "--image IMAGE --keep 17 --budget image": "image 0 of the prompt has only 16 visual tokens",
    "--image IMAGE --keep 33": "keep=33 was given, but the prompt has only 32 visual tokens",
    "--keep 0.5,0.25": "keep=(0.5, 0.25) holds 2 values for the pruning layers (1,); give one for all",
    "--keep 0.25,0.5 --layers 1,2": "keep=(0.25, 0.5) was given, which rises from layer to layer",
    # where
    "--layers 0": "--layers 0 was given for a model of 4 layers; capa takes --layers from 1 to 3.",
    "--method random --layers 4": "--layers 4 was given for a model of 4 layers; random takes --layers from 0 to 3.",
    "--layers 2,4": "--layers 2,4 was given for a model of 4 layers",
    "--layers 3,2": "layers=(3, 2) was given; give different layers in rising order.",
    "--layers x": "--layers x was given; give layers or rising ranges with commas between, such as 2-5,7.",
    "--layers none": "--layers none was given without --ffn, which leaves nothing to do; give pruning",
    "--layers 2 --paper-stage late": "--layers and --paper-stage were given; give one of them.",
    # by what
    "--method snap": "The pruning method 'snap' is not known; give one of capa, fastv, random, vision-attention.",
    "--method fastv --score random": "--score was given, which the method fastv does not have; use it with capa, or",
    "--method fastv --seed 1": "--seed was given, which the method fastv does not have; use it with capa or random, or",
    "--method random --only-dumps": "--only-dumps was given, which the method random does not have",
    "--method fastv --ffn skip --ffn-layers 2": "--ffn was given, which the method fastv does not have",
    "--method fastv --ffn skip": "--ffn was given, which the method fastv does not have; use it with capa, or",
    "--score entropy": "Invalid value for '--score'",
    "--tau 3": "--tau was given without --protect-anchors or --only-dumps, which alone use it; give one of them",
    "--tau 0 --only-dumps": "--tau 0 was given; give a positive number, relative or auto.",
    "--protect-anchors": "--tau auto is relative for a model of width 32, but below width",
    "--protect-anchors --tau relative": "--tau relative was given for a model of width 32, but below width",
    "--only-dumps --tau 20": "--tau 20 can never be reached by a model of width 32",
    "--rescore every_step --only-dumps": TOO_MUCH_AT_ONCE,
    "--rescore every_step --ffn skip --ffn-layers 2": TOO_MUCH_AT_ONCE,
    # FFNs
    "--ffn NONE": "none.safetensors does not exist; give a safetensors file that capa_probe's calibration wrote.",
    "--ffn JUNK": "junk.safetensors is damaged or was not written by capa_probe's calibration; calibrate again",
    "--ffn FOLDER": "is a folder; give a safetensors file",
    "--ffn NARROW": "narrow.safetensors: HadamardFFN is for a model of width 16, but this one has 32; calibrate on",
    "--ffn DEEP": "deep.safetensors: HadamardFFN is for layer 9, but the model has layers 0 to 3; use",
    "--ffn OTHER": "other.safetensors: HadamardFFN was calibrated on other weights",
    "--ffn OTHER --ffn-layers 1,3": "HadamardFFN was calibrated on other weights",
    "--ffn PLAIN --ffn-layers 0-1": "Layers [0] were asked of a HadamardFFN for layers [1]; calibrate them too.",
    "--ffn skip": "--ffn skip was given without --ffn-layers; say in which layers, such as 2-5.",
    "--ffn skip --ffn-layers 4": "Layer 4 was given, but the model has layers 0 to 3; give some of these.",
    "--ffn skip --ffn-layers b": "--ffn-layers b was given; give layers or rising ranges",
    "--ffn-layers 2": "--ffn-layers was given without --ffn; give --ffn FILE or --ffn skip as well.",
    # the prompt
    "--image NOIMAGE": "no.png does not exist.",
    "--image BADIMAGE": "bad.png cannot be read as an image",
    "--prompt ": "--prompt '' was given; give a question that is not empty.",
    "--prompt <image><image>what": "Prompt 0 holds 2 image placeholders (<image>) for 1 images",
    # the run
    "--max-new-tokens 0": "Invalid value for '--max-new-tokens'",
    "--repeats -1": "Invalid value for '--repeats'",
    "--execution fast": "Invalid value for '--execution'",
    "--json FOLDER": "which is no file in a folder that exists; give another.",
    "--json NOFOLDER": "which is no file in a folder that exists; give another.",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("run")
    model, image = processors.save("llava", folder / "model"), folder / "image.png"
    processors.image(16, 16).save(image)
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "junk.safetensors").write_text("no tensors")
    HadamardFFN({1: torch.ones(16)}).save(folder / "narrow.safetensors")
    HadamardFFN({9: torch.ones(32)}).save(folder / "deep.safetensors")
    HadamardFFN({1: torch.ones(32)}).save(folder / "plain.safetensors")
    other = cp.HookedLVLM(tiny.build("llava", seed=1))
    inputs = tiny.inputs("llava", (1,))
    cp.calibrate_hadamard(other, [inputs], [1, 3], progress=False).save(folder / "other.safetensors")
    files = {
        "NONE": "none",
        "JUNK": "junk",
        "NARROW": "narrow",
        "DEEP": "deep",
        "OTHER": "other",
        "PLAIN": "plain",
    }
    return {
        **{word: folder / f"{name}.safetensors" for word, name in files.items()},
        "MODEL": model,
        "IMAGE": image,
        "NOIMAGE": folder / "no.png",
        "BADIMAGE": folder / "bad.png",
        "FOLDER": folder,
        "NOFOLDER": folder / "not" / "there.json",
    }


def asked(places: dict[str, Path], options: str) -> tuple[str | Path, ...]:
    words = [places.get(word, word) for word in options.split(" ")]
    return (
        "run",
        places["MODEL"],
        "--image",
        places["IMAGE"],
        "--prompt",
        "what is it",
        "--repeats",
        "0",
        *words,
    )


@pytest.mark.parametrize("options", CASES)
def test_is_one_line(places: dict[str, Path], options: str, recwarn: pytest.WarningsRecorder) -> None:
    before = sorted(places["FOLDER"].iterdir())
    line = refused(invoke(*asked(places, options)))
    assert CASES[options] in line
    assert line.rstrip().endswith(".")
    assert not recwarn.list
    assert sorted(places["FOLDER"].iterdir()) == before


@pytest.mark.parametrize(
    "options", ["--keep 0 --allow-none", "--keep 16", "--keep 1", "--ffn PLAIN --layers none"]
)
def test_what_looks_like_it_is_not_refused(places: dict[str, Path], options: str) -> None:
    done = invoke(*asked(places, options), "--max-new-tokens", "2")
    assert done.exit_code == 0, done.output


def test_no_visual_token_is_left_only_when_asked_for_by_name(places: dict[str, Path]) -> None:
    done = invoke(*asked(places, "--keep 0 --allow-none --layers 2"), "--max-new-tokens", "2")
    assert ["visual", "tokens,", "layers", "2-3", "16", "0", "100.0%"] in [
        line.split() for line in done.stdout.splitlines()
    ]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    line = refused(invoke("run", tmp_path / "none", "--prompt", "what is it"))
    assert "none does not exist" in line
    assert "Missing option '--prompt'" in refused(invoke("run", tmp_path / "none"))


def test_a_placeholder_without_an_image(places: dict[str, Path]) -> None:
    line = refused(invoke("run", places["MODEL"], "--prompt", "<image> what"))
    assert "Prompt 0 holds 1 image placeholders (<image>) for 0 images" in line


def test_a_stage_that_a_shallow_model_does_not_have(tmp_path: Path) -> None:
    model = processors.save("llava", tmp_path / "shallow", num_hidden_layers=2)
    line = refused(invoke("run", model, "--prompt", "what is it", "--paper-stage", "late"))
    assert "The late stage was asked for, which a model of 2 layers does not have; give layers." in line


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (1, "--layers 1", "--layers 1 was given for a model of 1 layer; capa needs a layer before the one"),
        (
            2,
            "--method fastv",
            "fastv drops tokens before layer 2, which does not fit a model of 2 layers; fastv takes ",
        ),
    ],
)
def test_layers_of_a_shallow_model(tmp_path: Path, depth: int, options: str, message: str) -> None:
    model = processors.save("llava", tmp_path / "shallow", num_hidden_layers=depth)
    line = refused(invoke("run", model, "--prompt", "what is it", *options.split()))
    assert message in line
    assert "=" not in line


class TestInPython:
    def test_a_batch(self) -> None:
        lvlm = cp.HookedLVLM(tiny.shared("llava"))
        with pytest.raises(CapaProbeError, match="A batch of 2 prompts was given; give one prompt at a time"):
            run_one_prompt(lvlm, tiny.inputs("llava", (1, 1)), CAPA(layers=(2,)))

    def test_a_method_by_a_wrong_name(self) -> None:
        with pytest.raises(CapaProbeError, match="The pruning method 'CAPA' is not known; give one of capa"):
            build("CAPA")
        with pytest.raises(
            CapaProbeError, match="depth was given, which the method random does not have; leave it"
        ):
            build("random", depth=3)
