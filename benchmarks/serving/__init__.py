"""What a client gets over HTTP, of ours and of others: ``make bench``."""
