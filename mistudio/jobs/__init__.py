"""Long work. Whoever imports a job asks the Hub with the user's account and settings."""

from mistudio import credentials

credentials.install()
