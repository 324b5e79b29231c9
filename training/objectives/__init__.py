"""The losses. Each reads like the page it comes from; a recipe adds them up."""
