"""Phase 1 from its configuration: contrastive fine-tuning of a CLIP on image-report pairs."""

from __future__ import annotations

from functools import partial

from ..checkpoints.model_folder import describe
from ..data.leaks import check_apart
from ..data.loaders.choose import load_with
from ..data.loaders.evaluation import make_eval_loader
from ..data.manifest import load_manifest
from ..distributed.world import World
from ..models.clip import tokenize
from ..utils.names import data_name
from .config import TrainConfig
from .fingerprint import data_digest, resume_fingerprint
from .global_batch import GlobalContrastiveTask
from .setup import load_backbone, make_dataset, make_loader, report_run, share_batches, shares_batch, write_start
from .tasks import ContrastiveTask
from .trainer import Trainer


def build_contrastive(config: TrainConfig, world: World) -> Trainer:
    """Trainer of phase 1.

    Raises:
        UserError: unusable data, backbone or settings.
    """
    data = config.data
    manifest = load_manifest(data.train, image_root=data.image_root, need="text")
    clip, pixels = load_backbone(config, manifest)
    clip.train()
    # A partial of a module's function: loader processes that are not forked must be able to import it.
    words = partial(tokenize, context_length=clip.context_length)
    dataset = make_dataset(config, manifest, pixels, tokenize=words, augment=True)
    validation = None
    if data.val:
        held_out = load_manifest(data.val, image_root=data.image_root, need="text")
        check_apart(manifest, held_out)
        validation = make_eval_loader(
            make_dataset(config, held_out, pixels, tokenize=words, augment=False),
            batch_size=config.evaluation.batch_size,
            rank=world.rank,
            world_size=world.size,
            workers=data.workers,
            load=load_with(data.loader, world.device),
        )
    loader = make_loader(config, dataset, world)
    training = f"{len(manifest.samples)} image-report pairs, {data_name(data.train)}"
    write_start(config, world, describe("clip", clip, pixels, training=training), {})
    shared = shares_batch(config, world)
    task = (GlobalContrastiveTask if shared else ContrastiveTask)(
        clip.to(world.device),
        world,
        validation,
        config.precision,
        sharded=config.zero_stage == 3,
        text_drop_path=config.model.text_drop_path,
    )
    report_run(config, world, clip, loader, f"{len(manifest.samples):,} image-report pairs")
    fingerprint = resume_fingerprint(config, {"data.train": data_digest(manifest)})
    return Trainer(config, task, share_batches(config, world, loader), world, fingerprint)
