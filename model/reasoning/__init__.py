"""The chain of reasoning: the language model that reads picture and question, answers, and gives
one hidden state per answer token."""
