"""The mathematics: influence of each sample, torch only."""
