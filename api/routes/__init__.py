"""The routes: one thin file for each noun."""
