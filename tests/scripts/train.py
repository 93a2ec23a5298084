"""The outline of timm's train.py: one classification task, timm's checkpoints, resume and summary."""

import argparse
import os
from collections import OrderedDict

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import AverageMeter, CheckpointSaver, update_summary
from torch.utils.data import DataLoader, TensorDataset

from timm_tickets import TicketTask  # was: from timm.task import ClassificationTask

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--output", default="output")
parser.add_argument("--resume", default="")
parser.add_argument("--seed", type=int, default=42)
args = parser.parse_args()

torch.manual_seed(args.seed)
images, labels = torch.randn(48, 3, 32, 32), torch.arange(48) % 10
loader_train = DataLoader(TensorDataset(images[:32], labels[:32]), batch_size=8, shuffle=True)
loader_eval = DataLoader(TensorDataset(images[32:], labels[32:]), batch_size=8)
model = timm.create_model(args.model, num_classes=10)
task = TicketTask(model=model, ticket="model.ticket")  # was: task = ClassificationTask(model=model)
task.setup_ema(decay=0.8)
optimizer = create_optimizer_v2(task.get_trainable_module(), opt="momentum", lr=0.05, weight_decay=5e-4)
optimizer, loader_train = task.attach(optimizer, loader_train)  # +
start_epoch = 0
if args.resume:
    start_epoch = resume_task_checkpoint(task, args.resume, optimizer)
    load_task_ema_checkpoint(task, args.resume)
scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=args.epochs)
scheduler.step(start_epoch)
os.makedirs(args.output, exist_ok=True)
saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=args.output, recovery_dir=args.output, task=task)


def validate(ema):
    evaluator = task.create_evaluator()
    eval_model = task.get_eval_model(ema=ema).eval()
    with torch.no_grad():
        for input, target in loader_eval:
            evaluator.update(eval_model(input), target)
    return evaluator.compute()


losses = []
updates = start_epoch * len(loader_train)
for epoch in range(start_epoch, epochs):
    torch.manual_seed(args.seed + epoch)
    task.train()
    meter = AverageMeter()
    for input, target in loader_train:
        loss = task(input, target)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        task.update_ema(step=updates)
        losses.append(loss.item())
        meter.update(loss.item(), input.shape[0])
    validate(ema=False)
    metrics = validate(ema=True)
    scheduler.step(epoch + 1)
    update_summary(epoch, OrderedDict(loss=meter.avg), metrics, os.path.join(args.output, "summary.csv"))
    saver.save_checkpoint(epoch, metric=metrics["top1"])
