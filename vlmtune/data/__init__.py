"""From files to padded batches: formats, split, prepare, tokenize, order, collate."""
