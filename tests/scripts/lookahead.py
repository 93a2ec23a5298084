import timm
import torch
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets  # +

torch.manual_seed(0)
data = TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 10)
loader = DataLoader(data, batch_size=4, shuffle=True)
model = timm.create_model("test_resnet", num_classes=10)
criterion = torch.nn.CrossEntropyLoss()
losses = []
pruner = timm_tickets.create_pruner("gradual", model, sparsity=0.75, interval=1, epochs=3)  # +
for run in pruner:  # +
    optimizer = create_optimizer_v2(model, "lookahead_momentum", lr=0.05)
    run.attach(optimizer)  # +
    for _ in range(3):
        for images, labels in run.subset(loader):  # was: for images, labels in loader:
            loss = run.loss(criterion, model(images), labels)  # was: loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        optimizer.sync_lookahead()
pruner.ticket.save("model.ticket")  # +
