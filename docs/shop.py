import json, random
from datasets import Dataset
from tirlab.all import TIRConfig, TIRTrainer, answer_reward, tiny_policy

class Shop:
    def reset(self, keys, boxes, days, **row): self.keys, self.boxes, self.days = map(json.loads, (keys, boxes, days))
    def find(self, name: str, box: int) -> str:
        "Find the key of a box.\nArgs:\n name: Customer.\n box: Number of the box."
        return self.keys[f"{name} {box}"]
    def read(self, key: str) -> str:
        "Read the label that a key opens.\nArgs:\n key: Key of a box."
        return self.boxes[key]
    def book(self, name: str, day: int) -> str:
        "Book a delivery.\nArgs:\n name: Customer.\n day: Number of the day."
        if (said := self.days[f"{name} {day}"]).startswith("full"): raise ValueError(said)
        return said
    def python(self, code: str) -> str:
        "Add two numbers.\nArgs:\n code: A sum, such as 3+4."
        return str(sum(map(int, code.split("+"))))
    def get_turn_rewards(self, trajectory): return [-0.1 * any(r.error for r in turn.results) for turn in trajectory.turns]

def row(rng):
    (n, day), name, label = rng.sample(range(10, 100), 2), "".join(map(rng.choice, ("bdfgklm", "aeiou", "nprstvz"))), str(rng.randint(100, 999))
    asked, key = rng.choice([f"What is in box {n} of {name}?", f"Book day {day} for {name}. Which code?"]), rng.choice("bdfg") + str(day)
    days = {f"{name} {n}": label, f"{name} {day}": rng.choice([label, f"full, use {n}"])}
    return dict(prompt=[{"role": "user", "content": asked}], answer=label, keys=json.dumps({f"{name} {n}": key}), boxes=json.dumps({key: label}), days=json.dumps(days))

def rows(n=240, seed=0):
    rng = random.Random(seed)
    return Dataset.from_list([row(rng) for _ in range(n)])

if __name__ == "__main__":
    args = TIRConfig(output_dir="shop", advantage="gtpo", max_steps=30, learning_rate=1e-3, per_device_train_batch_size=64, num_generations=8, max_completion_length=160)
    TIRTrainer(tiny_policy(), answer_reward, args, rows(), environment_factory=Shop).train()
