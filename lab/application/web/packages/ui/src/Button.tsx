import type { ReactNode } from "react";

interface ButtonProps {
  children: ReactNode;
  onPress: () => void;
  disabled?: boolean;
}

export function Button({ children, onPress, disabled = false }: ButtonProps) {
  return (
    <button type="button" onClick={onPress} disabled={disabled}>
      {children}
    </button>
  );
}
