"""The command ``python -m dataset.synthetic``; its code is dataset/synthetic/write.py."""

from dataset.synthetic.write import main

if __name__ == "__main__":
    main()
