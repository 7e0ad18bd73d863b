"""Teams, their API keys and their presets."""
