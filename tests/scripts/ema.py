import timm
import torch
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets  # +

torch.manual_seed(0)
data = TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 10)
loader = DataLoader(data, batch_size=8, shuffle=True)
model = timm.create_model("test_resnet", num_classes=10)
ema = ModelEmaV3(model, decay=0.9)
criterion = torch.nn.CrossEntropyLoss()
losses = []
pruner = timm_tickets.create_pruner("gradual", model, sparsity=0.75, interval=2, epochs=2)  # +
for run in pruner:  # +
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    run.attach(optimizer)  # +
    for _ in range(2):
        for images, labels in run.subset(loader):  # was: for images, labels in loader:
            loss = run.loss(criterion, model(images), labels)  # was: loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
            losses.append(loss.item())
pruner.mask_(ema.module)  # +
torch.save(ema.module.state_dict(), "ema.pth")
pruner.ticket.save("model.ticket")  # +
