"""People in the loop: what they demonstrated and compared, and what they are asked to check."""
