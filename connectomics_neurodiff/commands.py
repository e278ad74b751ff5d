"""What the commands of :mod:`~connectomics_neurodiff.cli` do. Each imports only what it needs itself."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, MissingInput, OutputExists, ValueRangeError
from .provenance import require_writable

if TYPE_CHECKING:
    from .checkpoints import Checkpoint
    from .remodel import SignatureLibrary
    from .volume import ArrayLike, Volume


def _require_free(path: str, *inputs: str, force: bool) -> None:
    """Refuse, before any work, an output that is there already, cannot be written, or is one of the inputs."""
    from .volume import require_hdf5_name

    require_hdf5_name(path)
    _require_unused(path, *inputs, force=force)


def _require_unused(path: str, *inputs: str, force: bool) -> None:
    # Resolved: missing/../cells.h5 is not there until the folder is made, and then it is cells.h5.
    output = Path(path).resolve()
    for source in inputs:
        file = Path(source.split("::")[0])
        if output.exists() and file.exists() and output.samefile(file):
            raise OutputExists(f"{path} is an input of this command and would be lost, --force or not. Name another.")
    if output.exists() and not force:
        raise OutputExists(f"{path} exists; nothing was overwritten. Name another output, or use --force.")
    require_writable(path)


def _voxel_size(options: argparse.Namespace) -> tuple[float, ...] | None:
    return tuple(options.voxel_nm) if options.voxel_nm else None


def _image_of(path: str, options: argparse.Namespace) -> tuple[Volume, ArrayLike]:
    """A volume, not yet read, and its image."""
    from .volume import open_volume

    volume = open_volume(path, voxel_nm=_voxel_size(options))
    if volume.image is None:
        raise MissingInput(f"{path} has no dataset 'image'.")
    return volume, volume.image


def _warn_of_other_voxels(checkpoint: Checkpoint, path: str, volume: Volume) -> None:
    """Warn if a segmenter meets voxels that it was not trained on."""
    from .pipeline.networks import other_voxels

    if told := other_voxels(checkpoint, volume.voxel_nm):
        _warn(f"{path} {told}.")


def _warn(message: str) -> None:
    print(f"neurodiff: warning: {message}", file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    """``neurodiff run``"""
    from .config import load_config
    from .config.project import is_project
    from .pipeline import choose_stages, run_pipeline

    if is_project(options.config_file, options.config_base):
        if options.config_file is None:  # the base alone is the project
            options.config_file, options.config_base = options.config_base, None
        _run_project(options)
        return
    cfg = load_config(options.config_file, base=options.config_base, overrides=options.settings)
    engine = _chosen_engine(options)
    wanted = options.stages.split(",") if options.stages else ()
    stages = choose_stages(cfg, wanted, inference=options.inference, arm=options.arm)
    if options.dry_run:
        from .pipeline.plan import describe_plan

        print(describe_plan(cfg, stages, options.arm))
        return
    metrics = run_pipeline(
        cfg,
        stages=stages,
        inference=options.inference,
        checkpoint=options.checkpoint or "",
        force=options.force,
        engine=engine,
        arm=options.arm,
    )
    if metrics:
        print(score_table(metrics))
    folder = Path(cfg.DATASET.OUTPUT_PATH)
    if (folder / "report.html").exists():
        print(f"report: {folder / 'report.html'}")


def study(options: argparse.Namespace) -> None:
    """``neurodiff study``"""
    from .study import run_study
    from .study.tables import markdown_of

    content = run_study(
        options.study, options.settings, jobs=options.jobs, dry_run=options.dry_run, only_tables=options.tables
    )
    if content:
        print(markdown_of(content))


def _chosen_engine(options: argparse.Namespace) -> str:
    """The engine that --engine asks for, loaded, and told in the first line."""
    from .pipeline.engines import choose_engine, describe_engine, load_engine

    engine = choose_engine(options.engine)
    load_engine(engine)
    print(describe_engine(engine), file=sys.stderr)
    return engine


def _run_project(options: argparse.Namespace) -> None:
    """A project of the host's: with its own trainer, or said in our configuration and run with ours."""
    from .config import dump_config
    from .config.project import load_project
    from .pipeline import choose_stages, run_pipeline

    engine = _chosen_engine(options)
    if engine == "host":
        _run_project_on_host(options)
        return
    if options.checkpoint and not options.inference:
        raise ConfigError("--checkpoint of a project goes with --engine host; the native engine goes on by itself.")
    project = load_project(options.config_file, base=options.config_base, overrides=options.settings)
    for key, reason in project.without_effect.items():
        print(f"native engine: no effect: {key} {reason}", file=sys.stderr)
    for key, allowed in project.unsupported.items():
        print(f"native engine: not supported: {key} {allowed}", file=sys.stderr)
    if options.dry_run:
        print(dump_config(project.cfg))
        return
    if project.unsupported:
        faults = "; ".join(f"{key} is {allowed}" for key, allowed in project.unsupported.items())
        raise ConfigError(
            f"The native engine does not support this project. {faults}. Change that, or use --engine host."
        )
    if options.inference:
        raise ConfigError(
            "The native engine predicts a project's volumes with: neurodiff predict VOLUME OUT.h5 --checkpoint "
            f"{project.cfg.DATASET.OUTPUT_PATH}/segmenter/real/checkpoint.pt (mixed/ with SYNTHETIC)."
        )
    stages = choose_stages(project.cfg, options.stages.split(",") if options.stages else ())
    run_pipeline(project.cfg, stages=stages, force=options.force, engine=engine)
    print(f"trained: {project.cfg.DATASET.OUTPUT_PATH}/segmenter")


def _run_project_on_host(options: argparse.Namespace) -> None:
    from .host.v1.checks import check_project
    from .host.v1.project import describe_project, load_project, run_project
    from .pipeline import run_pipeline

    if options.stages:
        raise ConfigError("--stages is for our own recipes; the host trains a project from start to end.")
    cfg = load_project(
        options.config_file, base=options.config_base, overrides=options.settings, inference=options.inference
    )
    checkpoint = options.checkpoint or ""
    if options.dry_run:
        check_project(cfg, inference=options.inference, checkpoint=checkpoint)
        print(describe_project(cfg, inference=options.inference, checkpoint=checkpoint))
        return

    def make_pairs(native: Any, stages: Sequence[str]) -> None:
        run_pipeline(native, stages=stages, force=options.force, engine="host")

    folder = run_project(
        cfg, inference=options.inference, checkpoint=checkpoint, force=options.force, make_pairs=make_pairs
    )
    print(f"written to: {folder}")


def score_table(metrics: dict[str, Any]) -> str:
    """The scores of all arms and methods as text; lower is better."""
    from .pipeline.stages import SCORE_NAMES

    rows = [("", "", *SCORE_NAMES)]
    for arm in ("real", "mixed"):
        for method, scores in metrics.get(arm, {}).items():
            rows.append((arm, method, *(f"{scores[name]:.4f}" for name in SCORE_NAMES)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in rows)


def phantom(options: argparse.Namespace) -> None:
    """``neurodiff phantom``"""
    from .volume import grow_phantom, write_volume

    _require_free(options.output, force=options.force)
    volume = grow_phantom(tuple(options.shape), _voxel_size(options) or (29.0, 6.0, 6.0), options.seed)
    write_volume(options.output, volume.arrays, volume.voxel_nm, {"source": "phantom", "seed": options.seed})


def convert(options: argparse.Namespace) -> None:
    """``neurodiff convert``"""
    from .volume import convert as convert_volume

    convert_volume(options.input, options.output, voxel_nm=_voxel_size(options), role=options.role)


def info(options: argparse.Namespace) -> None:
    """``neurodiff info``"""
    from .volume import describe

    print(json.dumps(describe(options.path), indent=2, default=str))


def view(options: argparse.Namespace) -> None:
    """``neurodiff view``"""
    import time
    import webbrowser

    from .report import view as serve

    with serve(options.paths, host=options.bind, port=options.port, voxel_nm=_voxel_size(options)) as served:
        print(served.address, flush=True)
        print("showing until you press Ctrl-C", file=sys.stderr)
        if not options.no_browser:
            webbrowser.open(served.address)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            return


def remodel(options: argparse.Namespace) -> None:
    """``neurodiff remodel``"""
    from functools import partial

    from .conditions import MOST_THICKNESS_NM
    from .progress import progress
    from .remodel import fits_in_memory, gather_libraries, in_processes, workers_that_fit
    from .volume import check_training_volume, open_volume

    if options.copies < 1:
        raise ValueRangeError(f"--copies must be at least 1. Got {options.copies}.")
    if options.block_sections < 0:
        raise ValueRangeError(f"--block-sections must be at least 0. Got {options.block_sections}.")
    if options.workers < 0:
        raise ValueRangeError(f"--workers must be at least 0. Got {options.workers}.")
    if not 0 < options.membrane_nm <= MOST_THICKNESS_NM:
        raise ValueRangeError(
            f"--membrane-nm must be a number in (0, {MOST_THICKNESS_NM:g}]. Got {options.membrane_nm:g}."
        )
    first = Path(options.output)
    outputs = [first] + [first.with_name(f"{first.stem}_{i:03d}{first.suffix}") for i in range(1, options.copies)]
    for output in outputs:
        _require_free(str(output), options.volume, force=options.force)
    if options.no_mito and options.library and not options.save_library:
        raise ConfigError("--library says which mitochondria to place; it does not go with --no-mito.")
    for flag in ("mito_fraction", "mito_count"):
        if options.no_mito and getattr(options, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} is of mitochondria to place; it does not go with --no-mito.")
    if options.save_library:
        if not options.save_library.endswith(".npz"):
            raise ValueRangeError(f"--save-library writes a file whose name ends in .npz. Got {options.save_library}.")
        _require_unused(options.save_library, *options.library, force=options.force)
    lazy = open_volume(options.volume, voxel_nm=_voxel_size(options))
    check_training_volume(lazy, needs=("label", "image") if options.dark_bodies else ("label",))
    if options.block_sections or not fits_in_memory(lazy.shape):
        _remodel_in_blocks(options, lazy, outputs)
        return
    volume = _with_bodies(options, lazy)
    label, mito = volume.array("label"), volume.mito_array
    place = not options.no_mito
    library = gather_libraries(label, mito, volume.voxel_nm, options.library) if place or options.save_library else None
    if options.save_library and library is None:
        raise ValueRangeError("--save-library needs a volume with mitochondria. Got one without.")
    workers = workers_that_fit(label.size, len(outputs), options.workers)
    # A process of its own reads the volume itself: it is not sent through a pipe.
    job = partial(_remodel_copy, options, lazy if workers > 1 else volume, library)
    for _ in progress(in_processes(job, list(enumerate(outputs)), workers), label="remodel", total=len(outputs)):
        pass
    if options.save_library and library is not None:
        # At last: what a user has is not replaced by a command that is refused.
        library.save(options.save_library)


def _remodel_in_blocks(options: argparse.Namespace, volume: Volume, outputs: Sequence[Path]) -> None:
    """``neurodiff remodel`` of a volume that does not fit into memory, or that is to be made in blocks."""
    from .remodel import BlockwiseRemodelling, BlockwiseSettings, SignatureLibrary, sections_that_fit
    from .seeding import rng_for

    if options.save_library:
        raise ConfigError("--save-library measures a whole volume in memory; it does not go with blocks. Crop it.")
    if options.dark_bodies:
        raise ConfigError("--dark-bodies needs the whole volume in memory, not blocks of it.")
    assert volume.label is not None
    if volume.dark is not None:
        raise ConfigError(
            f"{volume.path} has a dataset 'dark', which is remodelled in memory only. For work in blocks copy its "
            "label and mito to a file without it."
        )
    sections = options.block_sections or sections_that_fit(volume.shape, volume.voxel_nm, options.membrane_nm)
    sections = min(sections, volume.shape[0])
    print(
        f"neurodiff: masks are made one after another, in blocks of {sections} of {volume.shape[0]} sections",
        file=sys.stderr,
    )
    files = [SignatureLibrary.load(path) for path in options.library]
    remodelling = BlockwiseRemodelling.of(
        volume.label,
        volume.mito,
        volume.voxel_nm,
        sections=sections,
        library=files[0].merged(*files[1:]) if files else None,
        settings=BlockwiseSettings(
            elastic=not options.no_elastic,
            place_mitochondria=not options.no_mito,
            mito_fraction=options.mito_fraction,
            mito_count=options.mito_count,
            membrane_thickness_nm=options.membrane_nm,
        ),
    )
    for copy, output in enumerate(outputs):
        attributes = {"seed": options.seed, "copy": copy}
        remodelling.make(output, rng_for(options.seed, "remodel", copy), attributes, overwrite=options.force)


def _with_bodies(options: argparse.Namespace, volume: Volume) -> Volume:
    """A volume in memory that knows what is dark inside its neurons if that is asked for."""
    from .conditions import with_dark_bodies

    loaded = volume.load()
    return with_dark_bodies(loaded, options.membrane_nm) if options.dark_bodies else loaded


def _remodel_copy(
    options: argparse.Namespace, volume: Volume, library: SignatureLibrary | None, copy: tuple[int, Path]
) -> None:
    """Make one of the masks of ``neurodiff remodel``, by its number and file."""
    from .remodel import mask_arrays
    from .remodel import remodel as remodel_masks
    from .seeding import rng_for
    from .volume import write_volume

    number, output = copy
    volume = _with_bodies(options, volume)
    mask = remodel_masks(
        volume.array("label"),
        volume.mito_array,
        volume.voxel_nm,
        rng_for(options.seed, "remodel", number),
        dark=volume.dark_array,
        elastic=not options.no_elastic,
        place_mitochondria=not options.no_mito,
        library=library,
        mito_fraction=options.mito_fraction,
        mito_count=options.mito_count,
        membrane_thickness_nm=options.membrane_nm,
    )
    write_volume(output, mask_arrays(mask), volume.voxel_nm, {"seed": options.seed, "copy": number})


def sample(options: argparse.Namespace) -> None:
    """``neurodiff sample``"""
    from .checkpoints import load_checkpoint
    from .conditions import BackgroundMask, OrganelleMask, check_masks
    from .engine import resolve_device
    from .geometry import same_voxel_size
    from .pairs import MaskArrays, match_grey_values, match_spectrum, write_pair
    from .synthesis import (
        DEFAULT_GUIDANCE,
        DEFAULT_MARGIN,
        GUIDED_LEVEL,
        denoiser_from_checkpoint,
        discard_scratch,
        grey_scale_for,
        guided,
        require_fitting_tile,
        synthesise,
        warn_of_voxel_size,
        warn_of_what_is_dark,
    )
    from .volume import open_array, open_volume, read_voxel_size

    _require_free(options.output, options.masks, options.checkpoint, force=options.force)
    checkpoint = load_checkpoint(options.checkpoint, kind="denoiser")
    voxel_nm = read_voxel_size(options.masks, voxel_nm=_voxel_size(options))
    volume = open_volume(options.masks, voxel_nm=voxel_nm)
    if volume.label is None:
        raise MissingInput(f"{options.masks} has no dataset 'label'.")
    membrane = open_array(options.masks, ("membrane",))
    check_masks(volume.label, membrane, volume.mito, volume.dark)
    warn_of_voxel_size(checkpoint, voxel_nm)
    warn_of_what_is_dark(checkpoint, volume.mito, volume.dark)
    if options.fit_to:
        real, real_image = _image_of(options.fit_to, options)
        if not same_voxel_size(real.voxel_nm, voxel_nm):
            raise ValueRangeError(
                f"--fit-to needs voxels of the masks' size {tuple(voxel_nm)} nm. Got {tuple(real.voxel_nm)} nm in "
                f"{options.fit_to}."
            )
    tile = tuple(options.tile or checkpoint.patch)
    device = resolve_device(options.gpus)
    require_fitting_tile(checkpoint, tile, DEFAULT_MARGIN, volume.shape, device)
    network, process = denoiser_from_checkpoint(checkpoint)
    guidance = DEFAULT_GUIDANCE if checkpoint.extra.get("condition_dropout") else 1.0
    guidance = guidance if options.guidance is None else options.guidance
    level = GUIDED_LEVEL if options.guidance_above is None else options.guidance_above
    if not level >= 0:
        raise ConfigError(f"--guidance-above must be >= 0. Got {level:g}.")
    network = guided(network, guidance, checkpoint, process.step_at(level))
    steps = min(10, process.steps) if options.steps is None else options.steps  # docs/painting.md
    # Beside the output: there is room for the whole volume, and the same command finds it again after a kill.
    scratch = Path(options.output).absolute().with_name(f".{Path(options.output).name}.unfinished")
    image = synthesise(
        network,
        process,
        BackgroundMask(membrane, volume.label),
        volume.mito if volume.dark is None else OrganelleMask(volume.mito, volume.dark),
        voxel_nm,
        seed=options.seed,
        grey=grey_scale_for(checkpoint, voxel_nm),
        sampler=options.sampler,
        steps=steps,
        tile=tile,
        overlap=tuple(options.overlap or (size // 8 for size in tile)),
        margin=DEFAULT_MARGIN,
        precision=options.precision,
        device=device,
        scratch=scratch,
        label="synthesis",
    )
    if options.fit_to:
        image = match_grey_values(match_spectrum(image, real_image, voxel_nm), real_image)
    attributes = {"seed": options.seed, "sampler": options.sampler, "steps": steps, "fitted": bool(options.fit_to)}
    attributes |= {"guidance": guidance, "guidance_above": level}
    write_pair(options.output, image, MaskArrays(volume.label, membrane, volume.mito), voxel_nm, attributes)
    discard_scratch(scratch)


def gate(options: argparse.Namespace) -> None:
    """``neurodiff gate``"""
    import tempfile

    import numpy as np

    from .conditions import membrane_from_labels
    from .geometry import Box
    from .pairs import (
        GateLimits,
        JudgeSettings,
        MaskArrays,
        gate_defect,
        judge_pair,
        measure_real,
        membrane_of_pair,
        open_pair,
        train_judge,
    )
    from .volume import check_training_volume, open_volume

    volume = open_volume(options.real, voxel_nm=_voxel_size(options))
    real = volume.crop(Box.of(options.box)) if options.box else volume.load()
    check_training_volume(real)
    pair = open_pair(options.pair, real.voxel_nm, even_refused=True).load()
    label, limits = real.array("label"), GateLimits()
    tissue = measure_real(
        real.array("image"),
        label,
        membrane_from_labels(label, real.voxel_nm, options.membrane_nm),
        real.mito_array,
        real.voxel_nm,
    )
    with tempfile.TemporaryDirectory() as folder:
        judge = train_judge(
            real,
            membrane_nm=options.membrane_nm,
            seed=options.seed,
            folder=Path(folder),
            settings=JudgeSettings(steps=options.judge_iterations),
        )
    if reason := gate_defect(tissue, judge, limits):
        raise ValueRangeError(reason)
    membrane = membrane_of_pair(options.pair, pair, options.membrane_nm)
    masks = MaskArrays(pair.array("label"), membrane, pair.mito_array)
    found = judge_pair(pair.array("image"), masks, real=tissue, judge=judge, limits=limits)
    if options.json:
        json.dump(found.as_dict(), sys.stdout, indent=2)
        print()
    else:
        for check in found.checks:
            allowed = f"{check.low:.3f} to {check.high:.3f}" if check.low > 0 or check.high < np.inf else ""
            verdict = "" if check.passed else "refused"
            print(f"{check.name:30} {check.got:9.3f}  real {check.real:9.3f}  allowed {allowed:18} {verdict}".rstrip())
    found.require()


def predict(options: argparse.Namespace) -> None:
    """``neurodiff predict``"""
    import numpy as np

    from .affinities import CONVENTION
    from .checkpoints import load_checkpoint
    from .engine import resolve_device
    from .pipeline.networks import trained_segmenter
    from .predict import predict_affinities
    from .volume import write_volume

    _require_free(options.output, options.volume, options.checkpoint, force=options.force)
    checkpoint = load_checkpoint(options.checkpoint, kind="segmenter")
    volume, image = _image_of(options.volume, options)
    _warn_of_other_voxels(checkpoint, options.volume, volume)
    tile = tuple(options.tile or checkpoint.patch)
    affinities = predict_affinities(
        trained_segmenter(checkpoint),
        image,
        tile=tile,
        overlap=tuple(size // 2 for size in tile),
        precision=options.precision,
        device=resolve_device(options.gpus),
        flip_augmentation=options.flip_augmentation,
        label="affinities",
    )
    write_volume(options.output, {"affinity": np.asarray(affinities)}, volume.voxel_nm, {"convention": CONVENTION})


def segment(options: argparse.Namespace) -> None:
    """``neurodiff segment``"""
    import numpy as np

    from .agglomerate import DEFAULT_THRESHOLDS
    from .agglomerate import segment as segment_affinities
    from .volume import open_array, read_voxel_size, write_volume

    _require_free(options.output, options.affinities, *filter(None, [options.checkpoint]), force=options.force)
    if options.method == "agq":
        _segment_image(options)
        return
    of_networks = {
        "--checkpoint": options.checkpoint,
        "--stitch-fraction": options.stitch_fraction is not None,
        "--tile": options.tile,
        "--gpus": options.gpus > 0,
        "--precision": options.precision != "auto",
    }
    given = [name for name, asked_for in of_networks.items() if asked_for]
    if given:
        raise ConfigError(
            f"{', '.join(of_networks)} go with --method agq; {options.method} takes affinities alone. "
            f"Got {', '.join(given)}."
        )
    voxel_nm = read_voxel_size(options.affinities, voxel_nm=_voxel_size(options))
    affinities = np.asarray(open_array(options.affinities, ("affinity", "main")))
    threshold = DEFAULT_THRESHOLDS[options.method] if options.threshold is None else options.threshold
    label = segment_affinities(affinities, options.method, threshold, voxel_nm)
    write_volume(options.output, {"label": label}, voxel_nm, {"method": options.method, "threshold": threshold})


def _segment_image(options: argparse.Namespace) -> None:
    import numpy as np

    from .agglomerate import segment_image
    from .checkpoints import load_checkpoint
    from .engine import resolve_device
    from .pipeline.networks import label_growth, trained_erosion, trained_segmenter, trained_voxels
    from .provenance import scratch_beside
    from .volume import write_volume

    if not options.checkpoint or options.threshold is not None:
        raise ConfigError("--method agq needs --checkpoint, a segmenter trained as 'agq', and has no --threshold.")
    checkpoint = load_checkpoint(options.checkpoint, kind="segmenter")
    if checkpoint.architecture != "agq":
        raise ConfigError(f"{options.checkpoint} holds the segmenter '{checkpoint.architecture}', not 'agq'.")
    volume, image = _image_of(options.affinities, options)
    _warn_of_other_voxels(checkpoint, options.affinities, volume)
    tile = tuple(options.tile or checkpoint.patch)
    if any(size == 1 < n for size, n in zip(tile, image.shape, strict=True)):
        raise ConfigError(
            f"Half of each block overlaps the next: --tile must be at least 2 on every axis of {tuple(image.shape)} "
            f"that is longer than 1. Got {tile}{'' if options.tile else ', as trained'}."
        )
    growth = label_growth(trained_erosion(checkpoint), trained_voxels(checkpoint, volume.voxel_nm)[0])
    network = trained_segmenter(checkpoint)
    with scratch_beside(options.output) as scratch:
        label = segment_image(
            network,
            image,
            block=tile,
            overlap=tuple(size // 2 for size in tile),
            precision=options.precision,
            device=resolve_device(options.gpus),
            min_fraction=0.5 if options.stitch_fraction is None else options.stitch_fraction,
            growth=growth,
            scratch=scratch,
        )
    write_volume(
        options.output, {"label": np.asarray(label)}, volume.voxel_nm, {"method": "agq", "growth": list(growth)}
    )


def evaluate(options: argparse.Namespace) -> None:
    """``neurodiff evaluate``"""
    import numpy as np

    from .metrics import evaluate as score
    from .volume import open_array

    segmentation = np.asarray(open_array(options.segmentation, ("label", "segmentation", "main")))
    truth = np.asarray(open_array(options.truth, ("label", "main")))
    scores = score(segmentation, truth).as_dict()
    if options.json:
        json.dump(scores, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(f"{name:>10} {value:.6f}" for name, value in scores.items()))


def fid(options: argparse.Namespace) -> None:
    """``neurodiff fid``"""
    from .checkpoints import load_checkpoint
    from .engine import resolve_device
    from .geometry import same_voxel_size
    from .metrics import fid3d
    from .pipeline.networks import trained_segmenter

    checkpoint = load_checkpoint(options.checkpoint, kind="segmenter")
    real, real_image = _image_of(options.real, options)
    synthetic, synthetic_image = _image_of(options.synthetic, options)
    if not same_voxel_size(real.voxel_nm, synthetic.voxel_nm):
        _warn(
            f"voxels of different size give different features: {tuple(real.voxel_nm)} nm in {options.real}, "
            f"{tuple(synthetic.voxel_nm)} nm in {options.synthetic}."
        )
    if checkpoint.extra.get("arm") == "mixed":
        _warn(f"{options.checkpoint} was trained on synthetic data too, which lowers their distance from real data.")
    halves = [max(min(sizes) // 2, 1) for sizes in zip(real_image.shape, synthetic_image.shape, strict=True)]
    found = fid3d(
        trained_segmenter(checkpoint),
        real_image,
        [synthetic_image],
        patch=options.patch or [min(size, half) for size, half in zip((16, 64, 64), halves, strict=True)],
        patches=options.patches,
        seed=options.seed,
        precision=options.precision,
        device=resolve_device(options.gpus),
    )
    if found.warning:
        _warn(found.warning)
    if options.json:
        json.dump(found.as_dict(), sys.stdout, indent=2)
        print()
    else:
        print(f"{found.distance:.6g}  95 % interval {found.interval[0]:.6g} to {found.interval[1]:.6g}")
        print(f"{found.floor:.6g}  floor: real patches against others of the same volume")
        print(f"{found.patches} patches of {found.features} features from each")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": run,
    "study": study,
    "phantom": phantom,
    "convert": convert,
    "info": info,
    "view": view,
    "remodel": remodel,
    "sample": sample,
    "gate": gate,
    "predict": predict,
    "segment": segment,
    "evaluate": evaluate,
    "fid": fid,
}
