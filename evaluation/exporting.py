"""Writes the ensemble of a checkpoint, or its cascade, as a file and compares it: the program `script/export.py`.

What it writes and when it refuses to is `evaluation.export_flags.ABOUT`, which its --help shows.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dataset.unlabelled import file_inputs
from evaluation.answer_report import check_flags, report_mode
from evaluation.calibration import calibrated_log_probs
from evaluation.ensemble import ensemble_scores
from evaluation.export import (
    CALIBRATED,
    OUTPUTS,
    LogProbs,
    Normalise,
    export_ensemble,
    file_bytes,
    load_exported,
    require,
)
from evaluation.export_cascade import (
    CASCADE_OUTPUTS,
    RUNNER,
    ExportedCascade,
    cascade_files,
    export_cascade,
    load_cascade,
    load_cascade_folder,
)
from evaluation.export_flags import FORMATS, INPUTS, PROGRAM, ExportFlags, read
from evaluation.held_out import reported_images
from evaluation.options import SAVES_MEMORY
from evaluation.session import Session, class_names_and_statistics, open_inputs, open_session, preprocessing
from model.splitnet import SplitNet
from record.checkpoint import PARTIAL
from record.run_folder import checkpoint_of
from utils import launch
from utils.errors import Incomplete, RunError, UserError, reason
from utils.program import Output, run_program, show

Found = TypeVar("Found")

COMPARED = 100  # images that an exported cascade is compared on
CLOSE = 1e-6  # of a bound, where float32 may decide otherwise
WRITERS = tuple(f".{name}" for name in FORMATS)


@dataclass(frozen=True)
class Difference:
    """How far a file is from eval.py on some images.

    Attributes:
        source: what the images are.
        absolute: largest difference of a logit of a network or of the ensemble.
        relative: the same by the largest logit.
    """

    source: str
    absolute: float
    relative: float


def metadata_of(session: Session, dtype: str) -> dict[str, Any]:
    """What a user of the file needs to know; `dtype` is of the images, a key of INPUTS."""
    classes, mean, std = class_names_and_statistics(session)
    info = session.info
    return {
        "checkpoint": session.checkpoint.name,
        "arch": list(info.archs),
        "networks": info.num_networks,
        "weights": info.weights,
        "rule": session.rule,
        "classes": list(classes),
        "preprocessing": preprocessing(session).as_dict(),
        "mean": list(mean),
        "std": list(std),
        "crop_size": info.crop_size,
        "input": INPUTS[dtype],
        "input_dtype": dtype,
        "outputs": {"ensemble": "scores [B, K] by the rule", "logits": "[networks, B, K]"},
        "torch": torch.__version__,
    }


def comparison_images(session: Session, batch_sizes: Sequence[int], dtype: str) -> Iterator[tuple[str, Tensor]]:
    """(what they are, images as the file takes them): of --predict, else random ones in several batch sizes.

    Raises:
        UserError: --predict names prepared floats, and the file takes pixels.
    """
    predict, crop = session.config.extra_options.predict, session.info.crop_size
    if predict is None:
        generator = torch.Generator().manual_seed(session.seed)
        for size in batch_sizes:
            shape = (size, 3, crop, crop)
            if dtype == "uint8":
                images_BCHW = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            else:
                images_BCHW = torch.randn(shape, generator=generator).to(session.precision.weights)
            yield f"{size} random image(s)", images_BCHW
        return
    path = Path(predict)
    if dtype == "uint8" and path.suffix.lower() == ".npy":
        raise UserError(f"--predict {path}: holds normalised floats, and --input uint8 takes images: give those.")
    if dtype == "uint8":
        recipe = session.file_recipe
        inputs = file_inputs(path, load=lambda split: session.loader(split, recipe), prepare=lambda images: images)
    else:
        _, mean, std = class_names_and_statistics(session)
        inputs = open_inputs(session, path, mean, std)
    for _, images_BCHW in inputs.batches:
        yield f"{len(images_BCHW)} image(s) of {predict}", images_BCHW


def calibrated(session: Session) -> LogProbs | None:
    """Log-probabilities [B, K] of logits [S, B, K] by the temperatures of a tuned checkpoint; None without.

    Raises:
        UserError: --calibrate asks for another way than was tuned.
    """
    answers = session.answers
    if answers is None or answers.temperatures is None or (mode := report_mode(session, answers)) == "none":
        return None
    return partial(calibrated_log_probs, rule=answers.rule, mode=mode, fitted=answers.temperatures)


def compare(
    session: Session,
    path: Path,
    images: Iterator[tuple[str, Tensor]],
    prepare: Callable[[Tensor], Tensor],
    log_probs: LogProbs | None,
) -> list[Difference]:
    """What the file at `path` gives, beside what eval.py gives.

    Args:
        images: from `comparison_images`.
        prepare: what the file does with them before its networks.
        log_probs: from `calibrated`.
    """
    run, _ = load_exported(path)
    differences = []
    with torch.inference_mode():
        for source, images_BCHW in images:
            logits_SBK = session.network(prepare(images_BCHW))
            expected = [ensemble_scores(logits_SBK, session.rule), logits_SBK]
            if log_probs is not None:
                expected.append(log_probs(logits_SBK).exp())
            found = run(images_BCHW)
            absolute = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
            largest = max(float(tensor.abs().max()) for tensor in expected)
            differences.append(Difference(source, absolute, absolute / max(largest, 1e-12)))
    return differences


def write_if(out: Path, contents: bytes, judge: Callable[[Path], tuple[Found, bool]]) -> tuple[Found, bool]:
    """Write a file aside, and give it its name if it is judged to agree; (what the judge found, whether it does).

    Raises:
        RunError: it cannot be written; nothing is left.
    """
    aside = out.with_name(f"{out.stem}{PARTIAL}{out.suffix}")
    try:
        aside.write_bytes(contents)
        found, agrees = judge(aside)
        if agrees:
            os.replace(aside, out)
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written: {reason(error)}.") from None
    finally:
        aside.unlink(missing_ok=True)
    return found, agrees


def write_folder_if(
    out: Path, files: Mapping[str, bytes], judge: Callable[[Path], tuple[Found, bool]]
) -> tuple[Found, bool]:
    """`write_if` of a folder of files; `out` is not there, or empty.

    Raises:
        RunError: it cannot be written; nothing is left.
    """
    aside = out.with_name(out.name + PARTIAL)
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        aside.mkdir()
        for name, contents in files.items():
            (aside / name).write_bytes(contents)
        found, agrees = judge(aside)
        if agrees:
            os.replace(aside, out)
    except OSError as error:
        raise RunError(f"--out {out}/: cannot be written: {reason(error)}.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return found, agrees


def export(argv: list[str], flags: ExportFlags | None = None) -> Output:
    """Write and compare as a command line says, and show the differences; returns what the program ends with.

    Args:
        argv: the command line.
        flags: what it says, where it has been read already.

    Raises:
        UserError: a wrong flag or checkpoint, a missing package.
        RunError: the file cannot be written.
        Incomplete: it differs beyond the tolerance, and is not kept.
    """
    flags = flags or read(argv)
    checkpoint = checkpoint_of(flags.checkpoint)
    out = Path(flags.out or checkpoint.with_name(checkpoint.name.split(".")[0] + ".pt2"))
    is_folder = flags.out is not None and (flags.out.endswith("/") or out.is_dir())
    suffix = f".{flags.networks_format or 'onnx'}" if is_folder else out.suffix
    if suffix not in WRITERS:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(WRITERS)}, or of a cascade DIR/.")
    if flags.networks_format and not is_folder:
        raise UserError(f"--format {flags.networks_format}: is for a folder, --out DIR/; a file is as its name ends.")
    if is_folder and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}/: holds something already: name a new folder.")
    if suffix == ".onnx":
        require(("onnx", "onnxscript", "onnxruntime"))
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist.")
    session = open_session(flags.config, launch.join([]), [])
    check_flags(session)
    if session.options.answer == "cascade":
        results = export_by_cascade(session, out, flags.input, flags.tolerance, suffix if is_folder else None)
    elif is_folder:
        raise UserError(f"--out {out}/: a folder is for --answer cascade; the whole ensemble is one file.")
    else:
        results = export_all(session, out, flags.input, flags.tolerance, flags.batch_sizes)
    return Output(results, f"written: {results['out']}", flags.config.json)


def export_all(session: Session, out: Path, dtype: str, tolerance: float, batch_sizes: Sequence[int]) -> dict[str, Any]:
    """Write the whole ensemble, and compare it with the running one in batches of these sizes.

    Raises:
        RunError: the file cannot be written.
        Incomplete: it differs beyond the tolerance, and is not kept.
    """
    assert isinstance(session.network, SplitNet)
    crop, metadata = session.info.crop_size, metadata_of(session, dtype)
    prepare = Normalise(metadata["mean"], metadata["std"]) if dtype == "uint8" else None
    log_probs = calibrated(session)
    outputs = OUTPUTS if log_probs is None else CALIBRATED
    if session.answers is not None:
        metadata["answers"] = session.answers.as_dict()
    if log_probs is not None:
        metadata["outputs"]["probabilities"] = "[B, K], by the temperatures of `answers`"
    program = export_ensemble(session.network, session.rule, (3, crop, crop), prepare, log_probs)
    contents = file_bytes(program, out.suffix, metadata, outputs)

    def judge(written: Path) -> tuple[list[Difference], bool]:
        images = comparison_images(session, batch_sizes, dtype)
        found = compare(session, written, images, prepare or torch.nn.Identity(), log_probs)
        return found, all(one.relative <= tolerance for one in found)  # not so where one is NaN

    differences, agrees = write_if(out, contents, judge)
    for one in differences:
        show(f"{one.source}: largest difference {one.absolute:.2e}, {one.relative:.2e} of the largest logit")
    show(f"preprocessing: {json.dumps(metadata['preprocessing'])}")
    results = {
        "out": str(out) if agrees else None,
        "outputs": outputs,
        **{name: metadata[name] for name in ("arch", "networks", "weights", "rule", "crop_size")},
        "preprocessing": metadata["preprocessing"],
        "input": metadata["input"],
        "largest_difference": max(one.absolute for one in differences),
        "largest_relative_difference": max(one.relative for one in differences),
        "tolerance": tolerance,
    }
    if not agrees:
        raise Incomplete(f"beyond the tolerance of {tolerance:g}: no file is kept.", results)
    return results


def export_by_cascade(
    session: Session, out: Path, dtype: str, tolerance: float, networks_suffix: str | None
) -> dict[str, Any]:
    """Write a tuned cascade, and compare it with the running one, image by image.

    With `networks_suffix` a folder for batches, its networks in files that end so; else one file for one image.
    Compared are the images of --predict, else the first COMPARED reported ones where the data is there, else random
    ones. Images whose confidence is within CLOSE of a bound are left out of the count and named.

    Raises:
        UserError: --input uint8.
        RunError: the file cannot be written.
        Incomplete: another number of networks for an image, or scores beyond the tolerance; nothing is kept.
    """
    answers = session.answers
    assert answers is not None
    assert isinstance(session.network, SplitNet)
    if dtype != "float32":
        raise UserError("--input uint8 is for the whole ensemble: --answer cascade takes normalised floats.")
    crop = session.info.crop_size
    metadata = metadata_of(session, dtype)
    metadata["outputs"] = {"ensemble": "scores [B, K] of the stage that answered", "networks": "how many ran [B]"}

    def judged(run: ExportedCascade) -> tuple[tuple[str, dict[str, Any]], bool]:
        source, images_BCHW = cascade_images(session)
        found = compare_cascade(session, run, images_BCHW)
        return (source, found), found["other_networks"] == 0 and found["largest_relative_difference"] <= tolerance

    if networks_suffix is None:
        metadata["input"] = "image [1, 3, crop, crop], float32: RGB / 255, minus mean, by std"
        metadata["answers"] = answers.as_dict()
        program = export_cascade(session.network, answers, (3, crop, crop))
        contents = file_bytes(program, out.suffix, metadata, CASCADE_OUTPUTS)
        (source, found), agrees = write_if(out, contents, lambda path: judged(load_cascade(path)))
    else:
        metadata["outputs"]["probabilities"] = "[B, K], by the temperatures of the stages"
        files = cascade_files(session.network, answers, (3, crop, crop), metadata, networks_suffix)
        (source, found), agrees = write_folder_if(out, files, lambda path: judged(load_cascade_folder(path)))
        show(f"to run it: python {out / RUNNER} IMAGES.npy ANSWERS.npz")
    show(
        f"{source}: {found['other_networks']} of {found['compared']} took another number of networks; largest "
        f"difference {found['largest_relative_difference']:.2e} of the largest score"
    )
    if found["too_close"]:
        show(f"left out, within {CLOSE:g} of a bound: images {', '.join(map(str, found['too_close']))}")
    results = {
        "out": str(out) if agrees else None,
        "outputs": CASCADE_OUTPUTS,
        **{name: metadata[name] for name in ("arch", "networks", "weights", "rule", "crop_size")},
        **found,
        "tolerance": tolerance,
    }
    if not agrees:
        raise Incomplete("the file does not answer as the cascade does: no file is kept.", results)
    return results


def cascade_images(session: Session) -> tuple[str, Tensor]:
    """(what they are, prepared images [B, 3, H, W]) to compare a cascade on; random ones leave early almost never."""
    if session.options.predict is None:
        try:
            images = reported_images(session, COMPARED)
            return f"{len(images)} reported image(s)", images
        except UserError as error:
            show(f"no images of the data set to compare on: {error}")
    parts = list(comparison_images(session, (COMPARED,), "float32"))
    return parts[0][0], torch.cat([images_BCHW for _, images_BCHW in parts])


def compare_cascade(session: Session, run: ExportedCascade, images_BCHW: Tensor) -> dict[str, Any]:
    """The exported cascade beside the running one: networks used must be equal, scores close."""
    answers = session.answers
    assert answers is not None
    assert answers.cascade is not None
    with torch.inference_mode():
        expected = answers.running_cascade(session.networks())(images_BCHW)
        stages = answers.stages(session.network(images_BCHW))
        scores_BK, used_B = run(images_BCHW)
    close_B = torch.zeros(len(images_BCHW), dtype=torch.bool)
    for k, bounds in enumerate(answers.cascade.bounds):
        for bound in bounds:
            close_B |= (stages.confidence_SN[k] - bound).abs() <= CLOSE
    same_B = used_B == expected.stage_B + 1
    other_B = ~same_B & ~close_B
    largest = float(expected.scores_BK.abs().max())
    apart = float((scores_BK.double() - expected.scores_BK)[same_B].abs().max()) if bool(same_B.any()) else 0.0
    return {
        "compared": int((~close_B).sum()),
        "other_networks": int(other_B.sum()),
        "too_close": close_B.nonzero().flatten().tolist(),
        "largest_difference": apart,
        "largest_relative_difference": apart / max(largest, 1e-12),
    }


def main(argv: list[str] | None = None, flags: ExportFlags | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 the file differs or cannot be written, 2 a user's mistake.

    Args:
        argv: the arguments without the program's name; None takes those of this process.
        flags: what they say, where they have been read already.
    """
    return run_program(PROGRAM, partial(export, flags=flags), argv, saves_memory=SAVES_MEMORY)
