"""The command line: what can be asked for, and how failures end (0 done, 2 the user's input is wrong, 1 our fault).

Only the parser lives here, so that ``--help`` answers at once; the work is in :mod:`~connectomics_neurodiff.commands`.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from ._version import __version__
from .errors import UserError, did_you_mean

#: HDF5 and torch take seeds of 63 bits.
_MOST_SEED = 2**63 - 1
CONFIG_HELP = "KEY VALUE pairs that replace settings, e.g. SOLVER.BASE_LR 2e-4"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line and names the nearest valid choice."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice: '" in message:
            got = message.split("invalid choice: '")[1].split("'")[0]
            known = [c for a in self._actions if a.choices for c in a.choices]
            message += did_you_mean(got, map(str, known))
        elif message.startswith("unrecognized arguments:"):
            got = message.split()[2]
            message += did_you_mean(got, [o for a in self._actions for o in a.option_strings])
        print(f"neurodiff: error: {_one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def parser_of(self, command: str) -> argparse.ArgumentParser:
        """The parser of one of the commands."""
        found: argparse.ArgumentParser = next(a.choices[command] for a in self._actions if isinstance(a.choices, dict))
        return found


def _one_line(message: object) -> str:
    """Text without line breaks: whoever reads our errors with a script counts on one line."""
    return " ".join(str(message).split())


def _seed(text: str) -> int:
    """A seed from the command line."""
    if not text.isdecimal() or int(text) > _MOST_SEED:
        raise argparse.ArgumentTypeError(f"a seed is a whole number >= 0, at most {_MOST_SEED}. Got '{text}'")
    return int(text)


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="whole number >= 0 (default: 0)")


def _add_voxel_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--voxel-nm", nargs=3, type=float, metavar=("Z", "Y", "X"), help="voxel size in nm, where the file has none"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT.h5", help="file to write; refused if it exists")
    parser.add_argument("--force", action="store_true", help="replace OUT.h5 if it exists")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, default=-1, help="0: CPU; -1: a GPU if there is one (default)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: auto")


def _add_run(commands: Any) -> None:
    run = _add_command(
        commands,
        "run",
        "the whole method: labelled volume to scored segmentations",
        "neurodiff run --config-file configs/NeuroDiff-Demo.yaml DATASET.OUTPUT_PATH outputs/demo",
    )
    run.add_argument("--config-file", metavar="FILE", help="YAML recipe (default: the built-in defaults)")
    run.add_argument("--config-base", metavar="FILE", help="YAML merged before --config-file")
    run.add_argument("--stages", metavar="A,B", help="only these stages, separated by commas")
    run.add_argument("--inference", action="store_true", help="only the stages after training")
    run.add_argument("--checkpoint", metavar="FILE", help="segmenter to use in place of the run's own")
    run.add_argument("--engine", choices=("auto", "native", "host"), default="auto", help="who trains (default: auto)")
    run.add_argument(
        "--arm",
        choices=("real", "mixed"),
        default="",
        help="score this one alone, and train no other unless its pairs need it",
    )
    run.add_argument("--dry-run", action="store_true", help="print config, stages, sizes, missing inputs; do nothing")
    run.add_argument("--force", action="store_true", help="make again what was made with other settings")
    run.add_argument("settings", nargs="*", metavar="KEY VALUE", help=CONFIG_HELP)


def _add_study(commands: Any) -> None:
    study = _add_command(
        commands,
        "study",
        "arms x seeds of one recipe, trained side by side and compared with error bars",
        "neurodiff study studies/demo.yaml --jobs 2",
    )
    study.add_argument("study", metavar="STUDY.yaml", help="recipe, arms and seeds (docs/studies.md)")
    study.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="trainings side by side, a thread each (default: 0, all cores)"
    )
    instead = study.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="say how many trainings, hours and bytes; do nothing")
    instead.add_argument("--tables", action="store_true", help="write the tables of what is trained; train nothing")
    study.add_argument("settings", nargs="*", metavar="KEY VALUE", help=CONFIG_HELP)


def _add_volume_commands(commands: Any) -> None:
    phantom = _add_command(
        commands, "phantom", "grow a labelled volume", "neurodiff phantom cells.h5 --shape 32 160 160 --voxel-nm 29 6 6"
    )
    _add_output(phantom)
    phantom.add_argument("--shape", nargs=3, type=int, default=(32, 160, 160), metavar=("Z", "Y", "X"), help="voxels")
    _add_seed(phantom)
    _add_voxel_size(phantom)

    convert = _add_command(
        commands,
        "convert",
        "PNG/TIFF stack, Zarr or HDF5 to a volume file; a second call adds labels to it",
        "neurodiff convert AC4/labels ac4.h5 --as label --voxel-nm 29 6 6",
    )
    convert.add_argument("input", metavar="IN", help="file, file.h5::dataset, or folder of sections")
    convert.add_argument("output", metavar="OUT.h5", help="new file, or one that lacks this dataset")
    convert.add_argument(
        "--as",
        dest="role",
        choices=("auto", "image", "label", "mito", "dark"),
        default="auto",
        help="default: told by name and type",
    )
    _add_voxel_size(convert)

    info = _add_command(commands, "info", "shape, type, voxel size, labels, provenance", "neurodiff info cells.h5")
    info.add_argument("path", metavar="PATH")
    _add_voxel_size(info)

    view = _add_command(commands, "view", "show volumes in Neuroglancer", "neurodiff view cells.h5 segmentation.h5")
    view.add_argument("paths", nargs="+", metavar="PATH")
    view.add_argument("--bind", default="127.0.0.1", help="address to listen on (default: this machine only)")
    view.add_argument("--port", type=int, default=0, help="default: any free one")
    view.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    _add_voxel_size(view)


def _add_synthesis_commands(commands: Any) -> None:
    remodel = _add_command(
        commands, "remodel", "bend membranes, place mitochondria", "neurodiff remodel cells.h5 masks.h5 --copies 4"
    )
    remodel.add_argument("volume", metavar="VOLUME.h5", help="needs labels; mitochondria are optional")
    _add_output(remodel)
    remodel.add_argument(
        "--copies", type=int, default=1, metavar="N", help="N masks: OUT.h5, OUT_001.h5, OUT_002.h5, ... (default: 1)"
    )
    remodel.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="copies made at a time, each in a process of its own; any number gives the same bytes; in "
        "blocks one after another (default: 0, as many as cores and memory allow)",
    )
    remodel.add_argument(
        "--block-sections",
        type=int,
        default=0,
        metavar="N",
        help="work from disk to disk in blocks of N sections, best a multiple of 8 (default: 0, the whole volume at "
        "once if memory holds it, else the largest blocks that fit)",
    )
    _add_seed(remodel)
    remodel.add_argument(
        "--dark-bodies",
        action="store_true",
        help="find what is dark inside neurons in the image, as a run does: large bodies are placed where there are no "
        "masks of mitochondria, all else moves along",
    )
    remodel.add_argument("--no-mito", action="store_true", help="leave the mitochondria where they are")
    remodel.add_argument("--no-elastic", action="store_true", help="leave the membranes where they are")
    remodel.add_argument(
        "--library",
        action="append",
        default=[],
        metavar="FILE.npz",
        help="mitochondria's shapes of other volumes, of any voxel size, to place beside VOLUME's own; may be repeated",
    )
    remodel.add_argument(
        "--save-library", metavar="FILE.npz", help="write the shapes that are placed, for other volumes"
    )
    remodel.add_argument(
        "--mito-fraction",
        type=float,
        metavar="SHARE",
        help="share of the volume that mitochondria fill, 0 to 1 (default: VOLUME's, or else that of the libraries)",
    )
    remodel.add_argument(
        "--mito-count",
        type=int,
        metavar="N",
        help="mitochondria that make up that share, of other sizes in proportion (default: as many as in real tissue)",
    )
    remodel.add_argument(
        "--membrane-nm", type=float, default=25.0, help="membrane width in nm, at most 200 (default: 25)"
    )
    _add_voxel_size(remodel)

    sample = _add_command(
        commands,
        "sample",
        "paint EM onto masks",
        "neurodiff sample masks.h5 pairs.h5 --checkpoint outputs/demo/diffusion/checkpoint.pt",
    )
    sample.add_argument("masks", metavar="MASKS.h5", help="label, membrane, mito")
    _add_output(sample)
    sample.add_argument("--checkpoint", required=True, metavar="C", help="trained denoiser")
    sample.add_argument("--sampler", choices=("ddpm", "ddim", "dpmpp"), default="dpmpp", help="default: dpmpp")
    sample.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help="how strictly the image follows the masks: 1 as trained, more: easier, less: harder to segment "
        "(default: 2, or 1 for a denoiser trained without condition dropout)",
    )
    sample.add_argument(
        "--guidance-above",
        type=float,
        metavar="LEVEL",
        help="noise over image, as standard deviations, below which steps are not guided (default: 1)",
    )
    sample.add_argument(
        "--fit-to",
        metavar="VOLUME.h5",
        help="give fine detail and grey values the power, mean and spread that they have in this image, as a run does; "
        "both are loaded",
    )
    sample.add_argument("--steps", type=int, metavar="N", help="default: 10, at most as many as trained")
    _add_seed(sample)
    sample.add_argument("--tile", nargs=3, type=int, metavar=("Z", "Y", "X"), help="voxels (default: as trained)")
    sample.add_argument("--overlap", nargs=3, type=int, metavar=("Z", "Y", "X"), help="default: an eighth of the tile")
    _add_voxel_size(sample)
    _add_device(sample)

    gate = _add_command(
        commands,
        "gate",
        "whether a synthetic pair follows its mask and looks like tissue, by the default limits; else it is an error",
        "neurodiff gate pair.h5 --real cells.h5 --box 0 0 0 40 512 512 --json",
    )
    gate.add_argument("pair", metavar="PAIR.h5", help="image and label; membrane and mito if it has them")
    gate.add_argument("--real", required=True, metavar="VOLUME.h5", help="image and label to compare with, loaded")
    gate.add_argument(
        "--box",
        nargs=6,
        type=int,
        metavar=("Z0", "Y0", "X0", "Z1", "Y1", "X1"),
        help="part of VOLUME.h5 (default: all)",
    )
    gate.add_argument(
        "--membrane-nm", type=float, default=25.0, help="membrane width in nm, as the masks were made (default: 25)"
    )
    gate.add_argument(
        "--judge-iterations", type=int, default=1000, metavar="N", help="training of the judge (default: 1000)"
    )
    gate.add_argument("--json", action="store_true", help="print JSON")
    _add_seed(gate)
    _add_voxel_size(gate)


def _add_segmentation_commands(commands: Any) -> None:
    predict = _add_command(
        commands,
        "predict",
        "affinities of a volume",
        "neurodiff predict cells.h5 affinities.h5 --checkpoint outputs/demo/segmenter/mixed/checkpoint.pt",
    )
    predict.add_argument("volume", metavar="VOLUME.h5")
    _add_output(predict)
    predict.add_argument("--checkpoint", required=True, metavar="C", help="trained segmenter")
    predict.add_argument("--tile", nargs=3, type=int, metavar=("Z", "Y", "X"), help="voxels (default: as trained)")
    predict.add_argument("--flip-augmentation", action="store_true", help="average over flips and transposes")
    _add_voxel_size(predict)
    _add_device(predict)

    segment = _add_command(
        commands,
        "segment",
        "affinities to a segmentation; with agq, an image to a segmentation",
        "neurodiff segment affinities.h5 segmentation.h5 --method waterz --threshold 0.3\n"
        "  neurodiff segment cells.h5 segmentation.h5 --method agq --checkpoint checkpoint.pt",
    )
    segment.add_argument("affinities", metavar="AFFINITIES.h5", help="affinities; with agq, a volume with an image")
    _add_output(segment)
    segment.add_argument("--method", choices=("waterz", "mean", "multicut", "agq"), required=True)
    segment.add_argument(
        "--threshold", type=float, help="0..1 (default: waterz .30, mean .75, multicut .25; agq has none)"
    )
    segment.add_argument("--checkpoint", metavar="FILE", help="agq: the trained segmenter, which tells neurons apart")
    segment.add_argument(
        "--stitch-fraction",
        type=float,
        metavar="F",
        help="agq: common share that joins two instances, 0..1 (default .5)",
    )
    segment.add_argument("--tile", nargs=3, type=int, metavar=("Z", "Y", "X"), help="agq: block, halves overlap")
    _add_device(segment)
    _add_voxel_size(segment)

    evaluate = _add_command(
        commands,
        "evaluate",
        "score a segmentation: variation of information (bits) and adapted Rand error",
        "neurodiff evaluate segmentation.h5 --truth cells.h5 --json",
    )
    evaluate.add_argument("segmentation", metavar="SEGMENTATION.h5")
    evaluate.add_argument("--truth", required=True, metavar="VOLUME.h5", help="its label 0 is ignored")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    fid = _add_command(
        commands,
        "fid",
        "3D-FID: distance of a synthetic volume from a real one, in the features of a segmenter trained on real data",
        "neurodiff fid cells.h5 pair.h5 --checkpoint outputs/demo/segmenter/real/checkpoint.pt --json",
    )
    fid.add_argument("real", metavar="REAL.h5", help="all of it is compared")
    fid.add_argument("synthetic", metavar="SYNTHETIC.h5")
    fid.add_argument("--checkpoint", required=True, metavar="C", help="segmenter trained on real data only")
    fid.add_argument(
        "--patch",
        nargs=3,
        type=int,
        metavar=("Z", "Y", "X"),
        help="voxels (default: 16 64 64, at most half of the smaller volume)",
    )
    fid.add_argument("--patches", type=int, default=256, metavar="N", help="at least 2 (default: 256)")
    fid.add_argument("--json", action="store_true", help="print JSON")
    _add_seed(fid)
    _add_voxel_size(fid)
    _add_device(fid)


def _add_command(commands: Any, name: str, what: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example: {example}"
    )
    return parser


def build_parser() -> _Parser:
    """The parser of all commands."""
    parser = _Parser(
        prog="neurodiff",
        description="New labelled EM volumes from the ones you have, and the segmenter trained on both.",
        epilog="example: neurodiff run --config-file configs/NeuroDiff-Demo.yaml",
    )
    parser.add_argument("--version", action="version", version=f"neurodiff {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_run(commands)
    _add_study(commands)
    _add_volume_commands(commands)
    _add_synthesis_commands(commands)
    _add_segmentation_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    # Read when torch is loaded. Threads that spin while they wait take the processor from what else runs there, and
    # wait for those that got none: a training beside other work takes half as long again (docs/performance.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Settings may follow options in any order, which argparse's "intermixed" parsing allows only without sub-commands.
    options, extra = build_parser().parse_known_args(arguments)
    if extra:
        if options.command in ("run", "study") and not any(text.startswith("-") for text in extra[::2]):
            options.settings += extra
        else:
            build_parser().parser_of(options.command).error(f"unrecognized arguments: {' '.join(extra)}")
    from . import commands

    sys.unraisablehook = _without_hdf5_echo
    try:
        commands.COMMANDS[options.command](options)
        sys.stdout.flush()  # a full disk behind stdout shows here, not when Python ends
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print(f"neurodiff: interrupted; {_AFTER_INTERRUPTION.get(options.command, _NOTHING_KEPT)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 0
    except MemoryError as error:
        return _refuse(f"not enough memory: {error}")
    except OSError as error:
        if error.errno not in _USERS_ERRNOS:
            return _confess()
        _drop_stdout()
        where = f": {error.filename}" if error.filename else ""
        return _refuse(f"{error.strerror}{where}")
    except Exception:
        return _confess()
    return 0


#: What an interrupted command leaves; all others leave nothing.
_AFTER_INTERRUPTION = {
    "run": "the same command goes on where it stopped",
    "study": "the same command goes on where it stopped",
    "sample": "the same command goes on where it stopped",
    "remodel": "masks that were finished stay, the same command with --force makes all of them anew",
}
_NOTHING_KEPT = "nothing was written, the same command starts anew"
#: What the operating system refuses for reasons that lie with files and disks, not with this package.
_USERS_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def _without_hdf5_echo(unraisable: sys.UnraisableHookArgs) -> None:
    """A file that could not be written in full is told by its error; h5py would tell it again, in ten lines."""
    if "file write failed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _refuse(reason: object) -> int:
    print(f"neurodiff: error: {_one_line(reason)}", file=sys.stderr)
    return 2


def _confess() -> int:
    traceback.print_exc()
    print("neurodiff: this is our fault; please report it with the traceback above", file=sys.stderr)
    return 1


def _drop_stdout() -> None:
    """What stdout still holds cannot be written; Python would try again at exit, and complain in its own words."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
