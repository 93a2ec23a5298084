import os

import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets  # +

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
data = TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 10)
loader = DataLoader(data, batch_size=8, shuffle=True)
model = timm.create_model("test_resnet", num_classes=10)
criterion = torch.nn.CrossEntropyLoss()
losses = []
pruner = timm_tickets.create_pruner("imp", model, sparsity=0.75, prune_rate=0.5, epochs=2, folder="search")  # +
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
accelerator.register_for_checkpointing(pruner)  # +
for run in pruner:  # +
    run.attach(optimizer)  # +
    first, skip = 0, 0
    if os.path.isdir(f"state/{run.name}"):  # +
        accelerator.load_state(f"state/{run.name}")  # +
        first, skip = divmod(run.batches, len(run.subset(loader)))  # +
    for epoch in range(first, 2):
        batches = run.subset(loader)  # was: batches = loader
        batches.set_epoch(epoch)
        for images, labels in accelerator.skip_first_batches(batches, skip if epoch == first else 0):
            loss = run.loss(criterion, model(images), labels)  # was: loss = criterion(model(images), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) % 5 == 0:
                accelerator.save_state(f"state/{run.name}")  # was: accelerator.save_state("state")
pruner.ticket.save("model.ticket")  # +
