import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets  # +

torch.manual_seed(0)
data = TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 10)
loader = DataLoader(data, batch_size=8, shuffle=True)
model = timm.create_model("test_resnet", num_classes=10)
criterion = torch.nn.CrossEntropyLoss()
losses = []
pruner = timm_tickets.create_pruner("imp", model, sparsity=0.75, prune_rate=0.5, epochs=2)  # +
for run in pruner:  # +
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    run.attach(optimizer)  # +
    for _ in range(2):
        for images, labels in run.subset(loader):  # was: for images, labels in loader:
            loss = run.loss(criterion, model(images), labels)  # was: loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
pruner.ticket.save("model.ticket")  # +
