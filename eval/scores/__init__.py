"""From ratings and replies to numbers with intervals. It draws nothing."""
