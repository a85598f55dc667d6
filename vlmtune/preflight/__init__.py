"""What a person wants to know before a GPU is taken: data, lengths, memory."""
