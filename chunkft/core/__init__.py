"""The chunk engine: torch and the standard library only, any nn.Module."""
