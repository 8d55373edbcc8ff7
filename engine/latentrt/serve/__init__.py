"""The server: many people, one engine, every step shared. Only `latentrt serve` imports this package."""
