"""What does a client's small picture take beside others: greedy clients, or one large picture?"""
