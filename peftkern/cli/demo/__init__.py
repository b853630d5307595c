"""The demo: fine-tune a real pretrained model on real text, every method beside the others."""
