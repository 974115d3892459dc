"""An environment whose user asks back, for what tirlab offers to other libraries."""


class Shop:
    "A shop with a user who asks once more."
    def reset(self, wants, **row): self.wants, self.sold, self.asked = wants, [], 0; return f" I want {wants}."

    def sell(self, ware: str, number: int = 1) -> str:
        """
        Sell something.

        Args:
            ware: What is sold.
            number: How many.
        """
        if ware == "air": raise ValueError("air is free")
        self.sold += [ware] * number
        return f"{ware}: {len(self.sold)} so far"

    def _reply(self, text):
        self.asked += 1
        return ("And a bag?", []) if self.asked == 1 else None

    def get_reward(self): return float(self.sold == [self.wants])
