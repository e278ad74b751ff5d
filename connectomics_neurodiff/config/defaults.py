"""Every configuration key with its default, unit, range and source.

SYSTEM, MODEL, DATASET, SOLVER, AUGMENTOR and INFERENCE carry the names that pytorch_connectomics v1 gives the same
things; what it has no word for lives under NEURODIFF. No key defaults to None: yacs would then accept any type.

Sources: [paper] Jiang et al., ISBI 2026; [published] the settings of its code; [pytc] pytorch_connectomics v1.0.0;
[superhuman] Lee et al. 2017; [segmamba] Xing et al. 2024; [agq] Chen et al. 2025; [lsd] Sheridan et al. 2023;
[ours] chosen here.
"""

from __future__ import annotations

from yacs.config import CfgNode


def default_config() -> CfgNode:
    """A fresh tree with every key at its default."""
    cfg = CfgNode()
    _add_system(cfg)
    _add_model(cfg)
    _add_dataset(cfg)
    _add_solver(cfg)
    _add_augmentor(cfg)
    _add_inference(cfg)
    cfg.NEURODIFF = CfgNode()
    _add_data(cfg.NEURODIFF)
    _add_remodel(cfg.NEURODIFF)
    _add_diffusion(cfg.NEURODIFF)
    _add_pairs(cfg.NEURODIFF)
    _add_segmenter(cfg.NEURODIFF)
    _add_agglomeration(cfg.NEURODIFF)
    _add_fid(cfg.NEURODIFF)
    return cfg


def _add_system(cfg: CfgNode) -> None:
    cfg.SYSTEM = CfgNode()
    # GPUs per machine. 0: CPU only. -1: all there are, CPU if there is none. [ours]
    cfg.SYSTEM.NUM_GPUS = -1
    # Data-loading processes per device, and processes that remodel copies of the masks, as far as memory allows. 0: no
    # other process than the training one, best below four cores. [pytc]
    cfg.SYSTEM.NUM_CPUS = 0
    # CPU threads of the numerical libraries. 0: all cores. The last bits of a result depend on it. [ours]
    cfg.SYSTEM.NUM_THREADS = 0
    # Machines of a distributed training, >= 1.
    cfg.SYSTEM.NUM_NODES = 1
    # Arithmetic of the networks: "fp32", "bf16", or "auto" (bf16 where the device has instructions for it).
    cfg.SYSTEM.PRECISION = "auto"


def _add_model(cfg: CfgNode) -> None:
    cfg.MODEL = CfgNode()
    # Affinity network, by registered name. [paper] uses Superhuman.
    cfg.MODEL.ARCHITECTURE = "superhuman"
    # Channels per level, finest first. Empty: as the architecture's authors published them.
    cfg.MODEL.FILTERS = []
    # Per pooling step, true: pool z as well (isotropic data); false: in-plane only. One entry fewer than FILTERS.
    # Empty: as published; [superhuman] never pools z, [segmamba] and swin_unetr always, [agq] in all but the first two
    # steps. swin_unetr has five steps, of which only the first may be false, and no FILTERS.
    cfg.MODEL.ISOTROPY = []
    # Normalisation of superhuman: "batch", "group", "instance" or "none".
    cfg.MODEL.NORM_MODE = "batch"
    # Channels of SwinUNETR's first stage, a multiple of 12; 24: 15.7 million parameters. [pytc] has 48.
    cfg.MODEL.SWIN_UNETR_FEATURE_SIZE = 24
    # Image channels, and affinity channels (z, y, x).
    cfg.MODEL.IN_PLANES = 1
    cfg.MODEL.OUT_PLANES = 3
    # What is learnt: "2" is the affinity z, y, x at the destination voxel. The native engine knows no other. [pytc]
    cfg.MODEL.TARGET_OPT = ["2"]
    # Loss terms and their weights: "WeightedBCEWithLogitsLoss" [published], "DiceLoss". The names are [pytc]'s.
    cfg.MODEL.LOSS_OPTION = ["WeightedBCEWithLogitsLoss"]
    cfg.MODEL.LOSS_WEIGHT = [1.0]
    # Blocks of pytorch_connectomics' own networks (unet_3d, where it is installed); ours have none to choose. [pytc]
    cfg.MODEL.BLOCK_TYPE = "residual"
    # Training patch in voxels, (z, y, x). [published] 16, 160, 160.
    cfg.MODEL.INPUT_SIZE = [16, 160, 160]


def _add_dataset(cfg: CfgNode) -> None:
    cfg.DATASET = CfgNode()
    # Folder that the names below are relative to.
    cfg.DATASET.INPUT_PATH = "."
    # Training volume: HDF5 (ours, or one dataset), TIFF stack, folder of PNG/TIFF sections, Zarr; "file.h5::dataset".
    # "phantom": the embedded, procedurally grown volume (NEURODIFF.PHANTOM).
    cfg.DATASET.IMAGE_NAME = "phantom"
    # File with the neuron labels. Empty: the same file as the image.
    cfg.DATASET.LABEL_NAME = ""
    # Tissue that nobody has annotated, of the same voxel size: names of files, or {IMAGE_NAME: .., BOX: ..}; without a
    # name of the training volume's file. "rest": all of that file outside of train, tune and test. The denoiser learns
    # from it, and AUGMENTOR.SYNTHETIC.SOURCE says what else it is for (docs/unlabeled.md). [ours]
    cfg.DATASET.UNLABELED = []
    # The run's folder: all that is made goes there and nowhere else.
    cfg.DATASET.OUTPUT_PATH = "outputs/neurodiff"


def _add_solver(cfg: CfgNode) -> None:
    cfg.SOLVER = CfgNode()  # training of the affinity network
    # "Adam", "AdamW" or "SGD". [published] Adam.
    cfg.SOLVER.NAME = "Adam"
    # Peak learning rate, > 0. [paper] 1e-4.
    cfg.SOLVER.BASE_LR = 1e-4
    # "constant", or "cosine": down to 1 % at the last iteration. [published] constant.
    cfg.SOLVER.LR_SCHEDULER_NAME = "constant"
    # Iterations of linear warm-up, >= 0.
    cfg.SOLVER.WARMUP_ITERS = 0
    # Optimiser steps. [paper] 200,000.
    cfg.SOLVER.ITERATION_TOTAL = 200000
    # Steps between checkpoints.
    cfg.SOLVER.ITERATION_SAVE = 1000
    # Patches per step and device. [paper] 2.
    cfg.SOLVER.SAMPLES_PER_BATCH = 2
    # Passes whose gradients are summed before a step, >= 1. [pytc]
    cfg.SOLVER.ITERATION_STEP = 1
    # Adam's constants. [published] eps .01, amsgrad.
    cfg.SOLVER.BETAS = [0.9, 0.999]
    cfg.SOLVER.EPS = 0.01
    cfg.SOLVER.AMSGRAD = True
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    # Largest gradient norm; 0: no clipping. [ours]
    cfg.SOLVER.CLIP_NORM = 0.0
    # Exponential moving average of the weights, [0, 1); 0: none. [ours]
    cfg.SOLVER.EMA_DECAY = 0.0


def _add_augmentor(cfg: CfgNode) -> None:
    cfg.AUGMENTOR = CfgNode()
    # Geometric and photometric augmentation of the training patches.
    cfg.AUGMENTOR.ENABLED = True
    # Probability of each, per patch, 0..1; what each does: training/augmentation.py. [ours]
    cfg.AUGMENTOR.FLIP = CfgNode({"P": 0.5})  # each axis by itself
    cfg.AUGMENTOR.TRANSPOSE = CfgNode({"P": 0.5})  # y and x
    cfg.AUGMENTOR.ROTATE = CfgNode({"P": 0.0})  # quarter turn; flips and transposes cover it
    cfg.AUGMENTOR.ELASTIC = CfgNode({"P": 0.0})
    cfg.AUGMENTOR.MISALIGNMENT = CfgNode({"P": 0.2})
    cfg.AUGMENTOR.GRAYSCALE = CfgNode({"P": 0.5})
    cfg.AUGMENTOR.SECTIONGRAYSCALE = CfgNode({"P": 0.2})
    cfg.AUGMENTOR.MISSINGSECTION = CfgNode({"P": 0.1})
    cfg.AUGMENTOR.MISSINGPARTS = CfgNode({"P": 0.1})
    cfg.AUGMENTOR.MOTIONBLUR = CfgNode({"P": 0.1})
    cfg.AUGMENTOR.BLUR = CfgNode({"P": 0.1})
    cfg.AUGMENTOR.CUTBLUR = CfgNode({"P": 0.1})
    cfg.AUGMENTOR.CUTNOISE = CfgNode({"P": 0.1})
    cfg.AUGMENTOR.NOISE = CfgNode({"P": 0.2})
    # Synthetic pairs. "SYNTHETIC: True" alone is short for ENABLED: True.
    cfg.AUGMENTOR.SYNTHETIC = CfgNode()
    cfg.AUGMENTOR.SYNTHETIC.ENABLED = False
    # Pair files made before (a path or a list of them). Empty: the run makes its own.
    cfg.AUGMENTOR.SYNTHETIC.PAIRS = []
    # What pairs the run makes, one or more of: "remodelled": painted onto the train part's masks [paper]; and of
    # DATASET.UNLABELED, segmented by the real arm's network, "repainted": painted onto these masks; "pseudo": the
    # tissue itself with these labels, as a control. [ours]
    cfg.AUGMENTOR.SYNTHETIC.SOURCE = ["remodelled"]
    # Synthetic : real patches, >= 0. [paper] 1.0.
    cfg.AUGMENTOR.SYNTHETIC.RATIO = 1.0
    # Part of the training in which synthetic patches are drawn, (0, 1]; the rest sees real ones only. [paper] 1.0.
    # The FIB recipes take .5: what was measured is in docs/results.md.
    cfg.AUGMENTOR.SYNTHETIC.UNTIL = 1.0


def _add_inference(cfg: CfgNode) -> None:
    cfg.INFERENCE = CfgNode()
    # Tile in voxels, (z, y, x), and the step from tile to tile.
    cfg.INFERENCE.INPUT_SIZE = [16, 160, 160]
    cfg.INFERENCE.STRIDE = [8, 80, 80]
    # Tiles per forward pass.
    cfg.INFERENCE.SAMPLES_PER_BATCH = 1
    # Average over flips and the in-plane transpose, with the affinities moved along. 16 times the work. [ours]
    cfg.INFERENCE.FLIP_AUGMENTATION = False


def _add_data(node: CfgNode) -> None:
    # Seed of everything, >= 0. One seed: the same bytes.
    node.SEED = 0
    # Voxel size in nm, (z, y, x). Empty: from the file, which must then have it.
    node.VOXEL_NM = []
    # Mitochondria masks. Empty: the dataset "mito" of the training volume if it has one, else membranes alone.
    node.MITO_NAME = ""
    # Find what is dark deep inside neurons in the image and tell the denoiser. Remodelling moves it along with its
    # neurons; where there are no masks of mitochondria, large dark bodies stand for them and are placed anew. [ours]
    node.DARK_BODIES = True
    # The three disjoint parts of the data. A box is [z0, y0, x0, z1, y1, x1] in voxels, half open; empty: all of it.
    node.SPLIT = CfgNode()
    # false: nothing is tuned or scored; all that is given trains one network, on mixed pairs if SYNTHETIC is on.
    node.SPLIT.SCORED = True
    node.SPLIT.TRAIN = CfgNode({"BOX": []})
    # Thresholds are tuned on TUNE and the scores come from TEST. An empty NAME is the training volume's file.
    node.SPLIT.TUNE = CfgNode({"IMAGE_NAME": "", "LABEL_NAME": "", "BOX": []})
    node.SPLIT.TEST = CfgNode({"IMAGE_NAME": "", "LABEL_NAME": "", "BOX": []})
    # The embedded volume.
    node.PHANTOM = CfgNode()
    node.PHANTOM.SHAPE = [48, 128, 128]
    node.PHANTOM.VOXEL_NM = [29.0, 6.0, 6.0]
    node.PHANTOM.SEED = 0


def _add_remodel(node: CfgNode) -> None:
    # Width of the membrane mask in nm, > 0, at most 200. [published] 3 px of 6 nm; 25 nm fits experts' best.
    node.MEMBRANE_NM = 25.0
    node.REMODEL = CfgNode()
    # Remodelled copies of the training volume, >= 1. [paper] as many synthetic voxels as real ones.
    node.REMODEL.COPIES = 1
    # Bend the membranes; place new mitochondria. [paper, table 5] both.
    node.REMODEL.ELASTIC = True
    node.REMODEL.MITOCHONDRIA = True
    # Deformation: standard deviation of the displacement, and distance between control points, nm. [published] 4 px on
    # a grid of 1/20 of the frame.
    node.REMODEL.SIGMA_NM = 24.0
    node.REMODEL.SPACING_NM = 300.0
    # Neurons that may receive mitochondria: this fraction, largest by volume. [paper] top 10 %.
    node.REMODEL.CANDIDATE_FRACTION = 0.1
    # Share of the volume that mitochondria fill, 0 to 1, and their number. 0: as in the train part, or else as in the
    # LIBRARY's tissue. A number of one's own changes their sizes, in proportion: their heights are then not compared
    # with the train part's (LIMITS.MITO_HEIGHT_P). [ours]
    node.REMODEL.MITO_FRACTION = 0.0
    node.REMODEL.MITO_COUNT = 0
    # File below INPUT_PATH with shapes of mitochondria, written by `neurodiff remodel --save-library`, to place beside
    # the train part's own, if it has any; lengths are in nm, so the voxel size may differ. "": none. [ours]
    node.REMODEL.LIBRARY = ""
    # A mask that fails one of these is drawn again, ATTEMPTS times (>= 1) in all. Compared with the train part: largest
    # relative difference of the share of mitochondria and of membranes, >= 0; smallest p of the Kolmogorov-Smirnov test
    # of the mitochondria's heights, 0 to 1, where there are 20; largest mean change of the neurons' profile areas, as a
    # logarithm, >= 0 (docs/remodelling.md). [ours]
    node.REMODEL.ATTEMPTS = 5
    node.REMODEL.LIMITS = CfgNode()
    node.REMODEL.LIMITS.MITO_FRACTION = 0.1
    node.REMODEL.LIMITS.MITO_HEIGHT_P = 0.05
    node.REMODEL.LIMITS.MEMBRANE_FRACTION = 0.25
    node.REMODEL.LIMITS.PROFILE_CHANGE = 0.2


def _add_diffusion(node: CfgNode) -> None:
    node.DIFFUSION = CfgNode()
    # Denoiser, by registered name and preset ("paper": 62 M parameters; "small", "tiny": for a CPU).
    node.DIFFUSION.ARCHITECTURE = "neurodiff"
    node.DIFFUSION.PRESET = "paper"
    # Diffusion steps T and offset s of the cosine schedule. [published] 250, .008.
    node.DIFFUSION.STEPS = 250
    node.DIFFUSION.COSINE_OFFSET = 0.008
    # What the network predicts: "noise" [published], "velocity", or "image", with which a small network paints neither
    # clouds nor noise after minutes on a CPU (docs/painting.md). [ours]
    node.DIFFUSION.PREDICTION = "image"
    # How the condition enters: "msc": hints at every level [paper]; "concat": with the noisy image; "both" [published],
    # whose hints lie at an eighth of the resolution, so that only the concatenation gives voxel-level control; "none".
    node.DIFFUSION.CONDITIONING = "both"
    # Finest levels whose convolutions stay within a section: for sections several times as thick as pixels are wide,
    # whose texture does not go on from one to the next. 0 [published]. [ours]
    node.DIFFUSION.FLAT_LEVELS = 0
    # Global modelling (RGM), its encoding of physical coordinates (RPGE), scan directions 1 [published] or 2.
    node.DIFFUSION.RGM = True
    node.DIFFUSION.RPGE = True
    node.DIFFUSION.SCAN_DIRECTIONS = 1
    # Add an embedding of the voxel size to that of the step: every block knows it, not only those with RPGE. Always on
    # where EXTRA_VOLUMES are trained on. [ours]
    node.DIFFUSION.RESOLUTION_EMBEDDING = False
    # Learn the variance of a reverse step as well, in a second output channel (Nichol and Dhariwal 2021, eq. 15, 16);
    # for samplers that add noise. [paper] Sigma_theta, [published] fixed.
    node.DIFFUSION.LEARN_VARIANCE = False
    # Volumes to train on beside the train part, also of other voxel sizes; painted are the train part's masks. Each is
    # the name of a file below DATASET.INPUT_PATH, or {IMAGE_NAME: ..} with LABEL_NAME, MITO_NAME, VOXEL_NM and BOX as
    # wanted; see DATASET and NEURODIFF.SPLIT. No voxel may be one of the tune or test part. [ours]
    node.DIFFUSION.EXTRA_VOLUMES = []
    # How several volumes share the samples: "voxels": in proportion to their voxels; "equal": alike. [ours]
    node.DIFFUSION.VOLUME_SHARE = "voxels"
    # Recompute activations in the backward pass: less memory, a tenth to a quarter more time (docs/performance.md).
    node.DIFFUSION.CHECKPOINTING = False
    # Training patch, voxels. [paper] 8, 512, 512.
    node.DIFFUSION.PATCH = [8, 512, 512]
    # Mirror every axis, exchange y and x of a square patch; largest relative change of contrast and absolute change of
    # brightness, 0..1, in units of the grey range. [ours]; [published] none.
    node.DIFFUSION.FLIPS = True
    node.DIFFUSION.TRANSPOSE = True
    node.DIFFUSION.INTENSITY_JITTER = 0.02
    # Probability of a sample without masks, [0, 1); classifier-free guidance needs .1 to .2 (Ho and Salimans 2022).
    node.DIFFUSION.CONDITION_DROPOUT = 0.1
    # Probability of a sample without voxel size, [0, 1): the checkpoint then also paints where it is unknown. [ours]
    node.DIFFUSION.VOXEL_SIZE_DROPOUT = 0.0
    # Error that is trained on: "l1" [published], or "l2", whose least is the mean image: with "l1" what is rare inside
    # neurons is not painted (docs/painting.md). [ours]
    node.DIFFUSION.LOSS = "l2"
    # Noise levels drawn in training, log-normal: mean and standard deviation of ln(noise / image), both as standard
    # deviations. SPREAD 0: all steps alike [published]. (Karras et al. 2022, shifted to where the layout is decided.)
    node.DIFFUSION.NOISE_MEAN = 1.2
    node.DIFFUSION.NOISE_SPREAD = 1.6
    # Min-SNR weighting of the loss, >= 0: largest signal-to-noise ratio that counts; 5 in Hang et al. 2023. 0: off.
    node.DIFFUSION.SNR_GAMMA = 0.0
    # Optimiser steps, samples per step, passes per step. [paper] 10,000, 1; [published] accumulation 2.
    node.DIFFUSION.ITERATIONS = 10000
    node.DIFFUSION.BATCH = 1
    node.DIFFUSION.ACCUMULATE = 2
    # Learning rate [paper] 1e-5; warm-up in iterations; "constant" or "cosine".
    node.DIFFUSION.LEARNING_RATE = 1e-5
    node.DIFFUSION.WARMUP = 100
    node.DIFFUSION.SCHEDULE = "constant"
    # Largest gradient norm; 0: no clipping. [ours]
    node.DIFFUSION.CLIP_NORM = 1.0
    # Moving average of the weights, per iteration. [published] .995 every 10 iterations.
    node.DIFFUSION.EMA_DECAY = 0.9995
    # Iterations between checkpoints.
    node.DIFFUSION.SAVE_EVERY = 500
    # Sampling: "ddpm" [published], "ddim" or "dpmpp"; steps <= STEPS.
    node.DIFFUSION.SAMPLER = "ddpm"
    node.DIFFUSION.SAMPLER_STEPS = 250
    # Classifier-free guidance, 0 to 100: 1 none [published]; above 1 the image follows the masks more strictly (easy
    # samples), below 1 more loosely (hard ones). Other than 1 needs CONDITION_DROPOUT > 0. [ho and salimans 2022]
    node.DIFFUSION.GUIDANCE = 2.0
    # Noise level (noise over image, as standard deviations), >= 0, below which steps are not guided, which saves half
    # of their cost and leaves the texture as it was learnt. 0: all are. [kynkaanniemi et al. 2024]
    node.DIFFUSION.GUIDANCE_ABOVE = 1.0
    # Tiles of the joint denoising and their overlap, voxels.
    node.DIFFUSION.TILE = [8, 512, 512]
    node.DIFFUSION.OVERLAP = [2, 64, 64]
    # Voxels, 0 to TILE, by which tiles at the faces of the volume reach into its mirror image: without, the outermost
    # voxels are noisier (docs/results.md). [ours]
    node.DIFFUSION.MARGIN = [0, 4, 4]


def _add_pairs(node: CfgNode) -> None:
    node.PAIRS = CfgNode()
    # What a pair must keep to, or it does not enter training; 0 switches a check off (docs/gate.md). All are [ours].
    # Iterations of the judge, a small boundary network that is trained on the train part, >= 1.
    node.PAIRS.JUDGE_ITERATIONS = 1000
    # Least share of the way from masks of elsewhere (0) to real tissue (1) that the image follows its mask; and largest
    # share of the mask's membranes that look like cytoplasm, 0..0.5, which also asks for no others than the mask's.
    node.PAIRS.LEAST_FOLLOWING = 0.5
    node.PAIRS.MOST_MISSING = 0.17
    # Largest Wasserstein distance between the grey values of a synthetic volume and the real one, in [0, 1] units.
    node.PAIRS.GREY_LIMIT = 0.08
    # Largest ratio, > 1, to the real power in a band of spatial frequency, to how unevenly the finest detail is spread
    # in the real volume, and to the real share of dark voxels deep inside neurons; largest difference of the
    # correlation of neighbouring sections, as Fisher's z; least share of the sections that are more like their
    # neighbours than like those farther away, 0..1.
    node.PAIRS.SPECTRUM_LIMIT = 2.0
    node.PAIRS.GRAIN_LIMIT = 1.35
    node.PAIRS.DARK_LIMIT = 1.2
    node.PAIRS.CONTINUITY_LIMIT = 0.25
    node.PAIRS.LEAST_ORDER = 0.85
    # Images painted onto each mask, >= 1. From two on the pair, which holds the first of them, also says where they
    # agree: its reliability (docs/method.md). Painting takes as many times longer. [ours]
    node.PAIRS.SAMPLES = 1
    # Shift and scale the grey values of a synthetic volume to the real mean and spread, one line per volume. [ours]
    node.PAIRS.MATCH_GREY = True
    # Give fine detail the power that it has in the real volume, by one filter per volume, at most a factor of 2. [ours]
    node.PAIRS.MATCH_SPECTRUM = True


def _add_segmenter(node: CfgNode) -> None:
    node.SEGMENTER = CfgNode()
    # Erode touching labels by this many voxels in the affinity target, so that a boundary is learnt between cells that
    # touch without a gap. 0 where the labels have gaps (AC3/AC4).
    node.SEGMENTER.LABEL_EROSION = 0
    # Weight the loss on synthetic pairs by their reliability; they need it (PAIRS.SAMPLES >= 2). Not for agq. [ours]
    node.SEGMENTER.RELIABILITY_WEIGHTS = False
    # How often in a training, evenly spaced, the segmenter is tried on the tune part; the one that finds its boundaries
    # best (average precision) is kept. 1: the last one, untried. [ours]
    node.SEGMENTER.CHECKPOINTS = 1
    # Learnt beside the affinities, for nothing but a better network; not by agq. Affinities over larger distances, each
    # [z, y, x] in voxels, shorter than MODEL.INPUT_SIZE; [superhuman, figure 3] has [2,0,0], [3,0,0], [4,0,0], [0,3,0],
    # [0,9,0], [0,27,0], [0,0,3], [0,0,9], [0,0,27].
    node.SEGMENTER.LONG_RANGE = []
    # Local shape descriptors [lsd]: standard deviation of the neighbourhood in nm, 0: none; and their loss's weight.
    node.SEGMENTER.SHAPE_SIGMA_NM = 0.0
    node.SEGMENTER.SHAPE_WEIGHT = 1.0
    # seg_mamba: 3 scans (forwards, backwards, across sections) with a skip connection around them [segmamba]; 1 and
    # false are the variant in the table of [paper].
    node.SEGMENTER.SCAN_ORIENTATIONS = 3
    node.SEGMENTER.SCAN_RESIDUAL = True
    # seg_mamba, swin_unetr: recompute activations in the backward pass; less memory, a third more time.
    node.SEGMENTER.CHECKPOINTING = False
    # agq: channels of the queries, a multiple of 8; learned queries >= 2; most components of the affinities that become
    # queries, and the voxels of the working grid above which they do. [agq] 64, 100, 100, 100.
    node.SEGMENTER.QUERY_WIDTH = 64
    node.SEGMENTER.LEARNED_QUERIES = 100
    node.SEGMENTER.GUIDED_QUERIES = 100
    node.SEGMENTER.SMALLEST_COMPONENT = 100
    # agq: centre the mask features, which otherwise turn to one direction in short trainings [ours; off in agq]; and
    # the weight of the loss that tells the voxels of neurons apart, >= 0. [agq] 0.1.
    node.SEGMENTER.CENTRED_FEATURES = False
    node.SEGMENTER.PIXEL_DISCRIMINATION = 0.1
    # agq: logit by which a query prefers the component it comes from at the start, >= 0; length in voxels, >= 1, over
    # which the position code of its features decays, 0: none. Both lower the loss of short trainings [ours]; 0 in
    # [agq].
    node.SEGMENTER.COMPONENT_PRIOR = 0.0
    node.SEGMENTER.POSITION_LENGTH = 0.0
    # agq: above 0, queries come from components that waterz makes at this threshold, 0..1, in place of connected ones,
    # which one gap in a membrane joins; and whether the network sees where in the block a voxel lies: then it works in
    # blocks of its training's size only. Both [ours]; 0 and true in [agq].
    node.SEGMENTER.COMPONENT_THRESHOLD = 0.0
    node.SEGMENTER.COORDINATES = True


def _add_agglomeration(node: CfgNode) -> None:
    node.SEGMENT = CfgNode()
    # Agglomerations to run: "waterz", "mean", "multicut", and with the segmenter agq also "agq", its own instances.
    node.SEGMENT.METHODS = ["waterz", "multicut"]
    # Thresholds tried on the tune split, 0..1: waterz and mean merge below it; multicut's is beta. [published] .30 and
    # .25 of waterz and multicut.
    node.SEGMENT.WATERZ_THRESHOLDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    node.SEGMENT.MEAN_THRESHOLDS = [0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9]
    node.SEGMENT.MULTICUT_THRESHOLDS = [0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    # agq: share of the blocks' overlap, in (0, 1], that two instances must have in common to be one neuron: of what is
    # there of the larger one. Higher passes on fewer false mergers and leaves more cuts. [ours]
    node.SEGMENT.STITCH_FRACTION = 0.5
    # What the tuning minimises, as the mean over three by three columns of the tune part: "voi" or "arand".
    node.SEGMENT.CRITERION = "arand"


def _add_fid(node: CfgNode) -> None:
    # 3D-FID of the synthetic pairs, in the deepest features of the segmenter trained on real data only. [ours]
    node.FID = CfgNode()
    # Patch in voxels, (z, y, x); shorter where a volume is.
    node.FID.PATCH = [16, 64, 64]
    # Patches of the real and of the synthetic volumes; 0: no 3D-FID, else >= 2. More than the network has features
    # (superhuman 80, agq 160, swin_unetr 384, seg_mamba 768), or the distance is too large.
    node.FID.PATCHES = 256
    # Resamples of the bootstrap that gives the interval, >= 1.
    node.FID.BOOTSTRAP = 100
