"""The outline of timm's train.py, in its order: model, loaders, task, optimizer, resume, EMA, saver, schedule."""

import argparse
import os
from collections import OrderedDict

import timm
import torch
from timm import utils
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

from timm_tickets import wrap  # +

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", default="data")
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--warmup-epochs", type=int, default=0)
parser.add_argument("--cooldown-epochs", type=int, default=0)
parser.add_argument("--use-multi-epochs-loader", action="store_true")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--start-epoch", type=int)
parser.add_argument("--output", default="output")
parser.add_argument("--resume", default="")
parser.add_argument("--seed", type=int, default=42)
args = parser.parse_args()
device = torch.device("cpu")

utils.random_seed(args.seed)
model = timm.create_model(args.model, num_classes=10)
data = {"input_size": (3, 32, 32), "batch_size": args.batch_size, "num_workers": 0, "persistent_workers": False}
dataset_train = create_dataset("", root=args.data_dir, split="train", is_training=True)
dataset_eval = create_dataset("", root=args.data_dir, split="val")
multi = {"use_multi_epochs_loader": args.use_multi_epochs_loader}
loader_train = create_loader(dataset_train, is_training=True, no_aug=True, device=device, **data, **multi)
loader_eval = create_loader(dataset_eval, is_training=False, device=device, **data)
task = ClassificationTask(model=model, criterion=torch.nn.CrossEntropyLoss(), device=device)
task = wrap(task, ticket="model.ticket")  # +
model, eval_model = task.get_trainable_module(), task.get_eval_model()
optimizer = create_optimizer_v2(model, opt="momentum", lr=0.05, weight_decay=5e-4)
optimizer, loader_train = task.attach(optimizer, loader_train)  # +
resume_epoch = None
if args.resume:
    resume_epoch = resume_task_checkpoint(task, args.resume, optimizer)
task.setup_ema(decay=0.8)
if args.resume:
    load_task_ema_checkpoint(task, args.resume)
os.makedirs(args.output, exist_ok=True)
saver = utils.CheckpointSaver(model, optimizer, args, checkpoint_dir=args.output, recovery_dir=args.output, task=task)
updates_per_epoch = len(loader_train)
scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
scheduler.step(start_epoch)


def validate(model):
    model.eval()
    loss, top1 = utils.AverageMeter(), utils.AverageMeter()
    with torch.inference_mode():
        for input, target in loader_eval:
            output = model(input)
            loss.update(torch.nn.functional.cross_entropy(output, target).item(), len(target))
            top1.update(utils.accuracy(output, target)[0].item(), len(target))
    return OrderedDict(loss=loss.avg, top1=top1.avg)


losses = []
for epoch in range(start_epoch, num_epochs):
    utils.random_seed(args.seed + epoch)
    model.train()
    num_updates = epoch * updates_per_epoch
    meter = utils.AverageMeter()
    for input, target in loader_train:
        loss = task(input, target)["loss"]
        loss.backward()
        utils.dispatch_clip_grad(task.get_clip_parameters(), 1.0)
        optimizer.step()
        num_updates += 1
        optimizer.zero_grad()
        task.update_ema(step=num_updates)
        scheduler.step_update(num_updates)
        losses.append(loss.item())
        meter.update(loss.item(), input.shape[0])
    validate(eval_model)
    metrics = validate(task.get_eval_model(ema=True))
    metrics["sparsity"] = task.sparsity  # +
    summary = os.path.join(args.output, "summary.csv")
    lr, new = optimizer.param_groups[0]["lr"], not os.path.exists(summary)
    utils.update_summary(epoch, OrderedDict(loss=meter.avg), metrics, summary, lr=lr, write_header=new)
    saver.save_checkpoint(epoch, metric=metrics["top1"])
    scheduler.step(epoch + 1, metrics["top1"])
