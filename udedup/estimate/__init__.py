"""What processes could share, before anything is wrapped: looks at their memory from outside."""
