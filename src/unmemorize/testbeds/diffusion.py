"""A text-to-image model whose memory is known: four models of one kind, trained here.

    general     general pictures alone
    memorized   general, trained on with some pictures repeated among the others
    twin        the same steps, noise and order, with a general picture wherever a target would have come
    injected    general, with one picture per prompt held by chosen value neurons alone (truth/)

The twin still memorizes neighbours and heldout pictures: it is what a perfect removal of the targets would leave. Every
stage is saved when it is done and skipped when it is there; an interrupted one goes on from its last checkpoint and
ends in the same weights.

testbed/
config.json         settings, digest of the pictures
prompts.csv         prompt, group, picture, source
captions.txt        captions of general pictures, for the statistics of activations
pictures/           what was trained on for each memorized prompt, and kept out for each ordinary one
general/ memorized/ twin/ injected/     pipelines in diffusers format
truth.json          prompt -> neuron file in truth/
verification.json   what the models reproduce

Nothing is localized or removed here. Source: ours; docs/testbeds.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmemorize.errors import FileFormatError, RunFolderError
from unmemorize.files import read_json, write_json
from unmemorize.isolate.settings import first_difference
from unmemorize.neurons import NeuronSet, load_neurons
from unmemorize.records import Progress, ProgressCallback
from unmemorize.records.base import Group
from unmemorize.testbeds.injection import TRUTH_FILE, TRUTH_FORMAT, TRUTH_VERSION, verify_injection
from unmemorize.testbeds.material import (
    CAPTIONS_FILE,
    Material,
    TestbedPrompt,
    gather,
    read_prompts,
    write_material,
)
from unmemorize.testbeds.settings import Stage, TestbedSettings, settings_from_json
from unmemorize.testbeds.stages import CHECKPOINTS, loaded, run_stage
from unmemorize.testbeds.training import forget_checkpoints
from unmemorize.testbeds.verification import CopySettings, copy_errors, make_pictures, summary

TESTBED_FORMAT = "unmemorize.testbed"
TESTBED_VERSION = 1
VERIFICATION_FORMAT = "unmemorize.testbed-verification"

CONFIG_FILE = "config.json"
VERIFICATION_FILE = "verification.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Testbed:
    """A testbed's folder.

    Attributes:
        folder: where it is.
        settings: what it was made with.
        prompts: prompts of all groups.
    """

    __test__ = False  # not a test, whatever its name says

    folder: Path
    settings: TestbedSettings
    prompts: tuple[TestbedPrompt, ...]

    def model(self, stage: Stage) -> Path:
        """Return the pipeline folder of a stage.

        Raises:
            RunFolderError: if the stage has not been made.
        """
        path = self.folder / stage
        if not path.is_dir():
            raise RunFolderError(f"{self.folder} has no model {stage!r}; build the testbed to its end")
        return path

    def of_group(self, group: Group) -> tuple[TestbedPrompt, ...]:
        """Return the prompts of one group, in order."""
        return tuple(prompt for prompt in self.prompts if prompt.group == group)

    def captions(self) -> list[str]:
        """Return the captions of general pictures, each once."""
        return (self.folder / CAPTIONS_FILE).read_text(encoding="utf-8").splitlines()

    def truth(self) -> dict[str, NeuronSet]:
        """Return the neurons of each injected prompt; empty if that stage was left out."""
        if not (self.folder / TRUTH_FILE).is_file():
            return {}
        value = read_json(self.folder / TRUTH_FILE, format=TRUTH_FORMAT, version=TRUTH_VERSION)
        return {prompt: load_neurons(self.folder / path) for prompt, path in value["neurons"].items()}


def build_testbed(
    settings: TestbedSettings, out: str | Path, progress: ProgressCallback | None = None
) -> Testbed:
    """Build a testbed, or what is still missing of it.

    Args:
        settings: what to build.
        out: folder; made if missing.
        progress: called with steps done, loss and time left of each stage.

    Raises:
        ConfigError, DataError: if settings or pictures cannot be used; nothing is written then.
        RunFolderError: if `out` holds something else, or cannot be written.
        CheckpointMismatch, FileFormatError: if an unfinished stage is damaged or another one.
        MissingExtra: without diffusers or Pillow.
    """
    out = Path(out)
    _refuse_other(out, settings)
    if progress is not None:
        progress(Progress("pictures", 0, 1, "", "reading"))
    material = gather(settings)
    _write_start(out, settings, material)
    for stage in settings.stages:
        if not (out / stage).is_dir():
            run_stage(stage, settings, material, out, progress)
            forget_checkpoints(out / CHECKPOINTS / stage)
    forget_checkpoints(out / CHECKPOINTS)
    testbed = load_testbed(out)
    if not (out / VERIFICATION_FILE).is_file():
        verify_testbed(testbed, progress=progress)
    return testbed


def load_testbed(folder: str | Path) -> Testbed:
    """Read a testbed's folder; models are loaded by whoever needs them.

    Raises:
        FileFormatError: if the folder holds no testbed, or a damaged one.
    """
    folder = Path(folder)
    value = read_json(folder / CONFIG_FILE, format=TESTBED_FORMAT, version=TESTBED_VERSION)
    settings = value.get("settings")
    if not isinstance(settings, dict):
        raise FileFormatError(f"{folder / CONFIG_FILE} has no settings; build the testbed again")
    return Testbed(folder=folder, settings=settings_from_json(settings), prompts=read_prompts(folder))


def verify_testbed(
    testbed: Testbed, settings: CopySettings | None = None, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """Make pictures of every memorized prompt with every model, compare them, and write `verification.json`.

    Returns:
        State -> group -> errors by prompt and seed, median error, share of copies. Injected prompts are compared in
        two more states, with their own neurons closed and with a placebo closed.
    """
    settings = settings or CopySettings()
    states: dict[str, Any] = {}
    stages = [stage for stage in testbed.settings.stages if (testbed.folder / stage).is_dir()]
    for number, stage in enumerate(stages, start=1):
        pipe = loaded(testbed.folder / stage)
        groups: tuple[Group, ...] = ("target", "neighbour", "heldout")
        states[stage] = {}
        for group in groups:
            prompts = testbed.of_group(group)
            if prompts:
                made = make_pictures(pipe, [prompt.prompt for prompt in prompts], settings)
                pictures = [prompt.picture for prompt in prompts]
                states[stage][group] = summary(copy_errors(made, pictures))
        if stage == "injected":
            states |= verify_injection(pipe, testbed.prompts, testbed.truth(), settings)
        if progress is not None:
            progress(Progress("verify", number, len(stages), "models", stage))
    value = {
        "format": VERIFICATION_FORMAT,
        "format_version": 1,
        "seeds": list(settings.seeds),
        "num_steps": settings.num_steps,
        "guidance": settings.guidance,
        "states": states,
    }
    write_json(testbed.folder / VERIFICATION_FILE, value)
    return states


def _refuse_other(out: Path, settings: TestbedSettings) -> None:
    """Raise unless a folder is missing, empty, or holds a testbed of these settings, its stages apart."""
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file, expected a folder; choose another folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        theirs = read_json(out / CONFIG_FILE, format=TESTBED_FORMAT, version=TESTBED_VERSION)
    except FileFormatError as error:
        raise RunFolderError(
            f"{out} is not empty and holds no testbed ({error}); choose another folder"
        ) from error
    # More stages may be asked for later.
    wanted, there = ({**one, "stages": None} for one in (settings.to_json(), theirs.get("settings", {})))
    difference = first_difference(wanted, there)
    if difference is not None:
        raise RunFolderError(
            f"{out} holds another testbed: {difference}; choose another folder or the same settings"
        )


def _write_start(out: Path, settings: TestbedSettings, material: Material) -> None:
    """Write what comes before the models."""
    path = out / CONFIG_FILE
    digest = material.digest()
    if path.is_file():
        theirs = read_json(path, format=TESTBED_FORMAT, version=TESTBED_VERSION)
        if theirs.get("digest") != digest:
            raise RunFolderError(f"{out} was made from other pictures; choose another folder")
        if theirs.get("settings", {}).get("stages") == settings.to_json()["stages"]:
            return
    write_material(material, out)
    header = {"format": TESTBED_FORMAT, "format_version": TESTBED_VERSION, "family": "diffusion"}
    write_json(path, {**header, "settings": settings.to_json(), "digest": digest})
