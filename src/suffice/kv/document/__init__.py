"""A document whose compressed cache answers questions: at once, in a batch, as a stream or in a chat."""
