"""What the code does not say of a method: which kind it is, and when to take another one. Every pruner has an entry."""

KINDS = {
    "rounds": "In rounds: trained several times",
    "training": "In the training that you do anyway",
    "before": "Before any training",
    "frozen": "Weights that are never trained",
    "controls": "Controls",
    "channels": "torch-pruning's criteria: whole channels",
}

# name: kind, when to take it, when to take another one
METHODS = {
    "imp": (
        "rounds",
        "You want the reference that papers compare with, and a training a round is no matter. With `rewind: 2ep` on "
        "anything larger than digits.",
        "You have one training to spend: `gradual`, `rigl` or `set`. Or two: `prune_rate` equal to `sparsity` is one "
        "round.",
    ),
    "colt": (
        "rounds",
        "You want one mask that copies trained on parts of the classes agree on, or runs that several processes can "
        "train at once: those of a round are independent.",
        "The model has fewer classes than partitions (or set `split=samples`), or trainings are dear: a round is one "
        "for each partition.",
    ),
    "continuous_sparsification": (
        "rounds",
        "You want the number of trainings to be the same whatever the sparsity: three rounds and the ticket's own.",
        "Memory is short: it needs the most of all methods. Or timm's train.py is to be used, which it refuses.",
    ),
    "gradual": (
        "training",
        "You want a trained sparse model from one training, of any model, by timm's train.py too.",
        "The weights before training are what you are after (a lottery ticket to retrain): `imp`. Or the sparsity is "
        "to hold from the first step: `rigl`, `set`.",
    ),
    "rigl": (
        "training",
        "You want a trained model that was as sparse as asked from the first step to the last.",
        "You cut channels, heads or patterns: it moves single weights and refuses `granularity`.",
    ),
    "set": (
        "training",
        "As `rigl`, with no gradient of pruned weights to be computed: new weights are drawn at random.",
        "You cut channels, heads or patterns: it moves single weights and refuses `granularity`.",
    ),
    "snip": (
        "before",
        "You want the mask before training, from a batch or a few of your data.",
        "A layer's last scale begins at zero (timm's ResNets, unless `zero_init_last: false`): what is before it gets"
        " no gradient, and is cut first. Under FSDP2: refused.",
    ),
    "grasp": (
        "before",
        "You want the mask before training, and one that minds the gradient's flow and not the loss alone.",
        "As `snip`. Or the model has kernels of its own without a second derivative: it fails there.",
    ),
    "synflow": (
        "before",
        "You want the mask before training without any data.",
        "The model has attention, layer normalisation or standardised weights: the flow is no sum over paths there. "
        "Or FSDP2: refused.",
    ),
    "edge_popup": (
        "frozen",
        "You want the smallest file: masks and a seed. The weights are random and stay so.",
        "You need what trained weights reach at high sparsity: see .98 below.",
    ),
    "frozen_slt": (
        "frozen",
        "As `edge_popup`, with a file that is smaller still: part of the mask follows from the seed too.",
        "As `edge_popup`: see .98 below.",
    ),
    "jackpot": (
        "frozen",
        "You have pretrained weights, and want a subnetwork of these very weights: the file holds masks, and timm's "
        "weights are fetched when it is loaded.",
        "The model was never trained (it warns), or you may train its weights: `imp` or `gradual` with `pretrained: "
        "true`.",
    ),
    "magnitude": (
        "controls",
        "You want the control that costs nothing; or cut a trained model once, as a start for other libraries.",
        "You look for the best network: it takes no notice of data or training.",
    ),
    "random": (
        "controls",
        "You want to know what a mask is worth: one that does no better than this one has found nothing.",
        "You look for the best network.",
    ),
    "tp_magnitude": (
        "channels",
        "You use torch-pruning's `MagnitudeImportance` and want its channels as a ticket, on all of timm's modules.",
        "You want single weights pruned: it cuts channels and heads only.",
    ),
    "tp_lamp": (
        "channels",
        "As `tp_magnitude`, with scores that can be compared across layers.",
        "You want every layer to lose the same share.",
    ),
    "tp_taylor": (
        "channels",
        "You want channels ranked by what their removal does to the loss, on a few batches.",
        "There is no data before the training: `tp_magnitude`.",
    ),
    "tp_random": (
        "channels",
        "You want the control of the other criteria on channels.",
        "You look for the best network.",
    ),
    "tp_bn_scale": (
        "channels",
        "The model has batch normalisation, and one training with a penalty on its scales is no matter.",
        "The model has none, as ViTs: refused. Take `tp_group_norm`.",
    ),
    "tp_group_norm": (
        "channels",
        "You want the weakest channels of each group shrunk by a training before they are cut.",
        "No training is to be spent before the cut: `tp_magnitude`.",
    ),
    "tp_growing_reg": (
        "channels",
        "As `tp_group_norm`, with a decay of the weakest channels that grows as the training goes on.",
        "No training is to be spent before the cut: `tp_magnitude`.",
    ),
}

# What is wanted: what to take, why, and a recipe that does it on the embedded digits.
GOALS = (
    (
        "a small file",
        "`frozen_slt`, `edge_popup`",
        "masks and a seed; a frozen ticket of ResNet-18 has 431,523 bytes, its fp32 weights 44,657,408 "
        "(`ticket_size.md`)",
        "digits_frozen_slt",
    ),
    (
        "fast inference",
        "any that cuts, with `granularity: channel`; `tp_magnitude`",
        "whole channels can be taken out; zeros alone make nothing faster ([Faster](faster.md))",
        "digits_imp_channels",
    ),
    (
        "few trainings",
        "`gradual`; `rigl` or `set` to be sparse from the first step",
        "the ticket is the end of one training, nothing is trained again",
        "digits_gradual",
    ),
    (
        "no training before the mask",
        "`snip`, `grasp`, `synflow`",
        "a few batches, or none (`synflow`); then one training of the ticket",
        "digits_synflow",
    ),
    (
        "pretrained weights, as they are",
        "`jackpot`",
        "learns which of them to keep; with weights that may be trained, `imp` or `gradual` and "
        "`model.pretrained=true`",
        "digits_imp` first, then `digits_jackpot",
    ),
    (
        "transfer to other data",
        "`imp`, `colt`",
        "`timm-tickets transfer` trains the ticket elsewhere, controls beside it; what was measured of it lies within"
        " noise (`transfer.md`)",
        "digits_colt",
    ),
    (
        "a paper's reference",
        "`imp`, with `random` and `magnitude` as controls",
        "what new methods are compared with",
        "digits_imp",
    ),
)
