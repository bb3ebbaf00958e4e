"""Images and a prompt -> logits: one file a captioner."""
