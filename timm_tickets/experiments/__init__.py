"""What the command line does with a recipe: search, train, transfer, over seeds; its run folder and reports."""
