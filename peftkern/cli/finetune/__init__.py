"""`peftkern finetune`: any Hugging Face model, any text file, any method."""
