"""What strangers may write, tried with made-up bytes."""
