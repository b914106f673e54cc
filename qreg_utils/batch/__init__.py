"""What runs notebooks by the hundred, and shows and checks what they leave. No science imports it."""
